"""Train the bundled dense model, a small GPT-2: python examples/train_dense.py --out my_dense

With --leg-steps it stops early, and the same command continues from the checkpoint in the folder --run.
"""

import argparse
import os
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from bridges.data.corpus import bundled_corpus

DEFAULTS = dict(out="bridges/assets/dense", run="runs/dense", tokenizer="bridges/assets/tokenizer", seed=0)
DEFAULTS |= dict(steps=4800, warmup=200, lr=3e-3, batch_size=32, seq_len=128, width=64, layers=2, heads=4)
# Positions start at zero and decay strongly: what they add to the residual stream no bridge can predict.
DEFAULTS |= dict(weight_decay=0.1, position_decay=2.0)
DEFAULTS |= dict(leg_steps=0, checkpoint_every=300, split="train")  # leg_steps=0: to the end
DEFAULTS |= dict(graph=1)  # on a GPU, steps as one CUDA graph; 0: kernel by kernel


def new_model(args: argparse.Namespace, vocab_size: int) -> GPT2LMHeadModel:
    sizes = dict(vocab_size=vocab_size, n_positions=args.seq_len, n_embd=args.width, n_layer=args.layers)
    rest = dict(n_head=args.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **rest))
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    return model


def batch_of(rows: torch.Tensor, size: int, step: int, seed: int) -> torch.Tensor:
    epoch, index = divmod(step, len(rows) // size)
    return rows[epoch_order(len(rows), seed + epoch, rows.device)[index * size :][:size]]


@cache
def epoch_order(n_rows: int, seed: int, device: torch.device) -> torch.Tensor:
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed)).to(device)


def save_checkpoint(path: Path, model: GPT2LMHeadModel, optimizer: torch.optim.AdamW, steps: int) -> None:
    tensors = {f"{name}.{k}": v for name, p in model.named_parameters() for k, v in optimizer.state[p].items()}
    tensors |= {f"{name}.value": p.detach() for name, p in model.named_parameters()} | {"steps": torch.tensor(steps)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path: Path, model: GPT2LMHeadModel, optimizer: torch.optim.AdamW) -> int:
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"{name}.value"])
        state = {key: tensors[f"{name}.{key}"].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = state
    return int(tensors["steps"])


def train_step(model: GPT2LMHeadModel, optimizer: torch.optim.AdamW, batch: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(batch, labels=batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def graphed(model: GPT2LMHeadModel, optimizer: torch.optim.AdamW, like: torch.Tensor) -> Callable:
    """`train_step` as one CUDA graph: its kernels take longer to launch one by one than to run."""
    static, state = like.clone(), deepcopy((model.state_dict(), optimizer.state_dict()))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # warm-up steps, which are undone below
        for _ in range(3):
            train_step(model, optimizer, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train_step(model, optimizer, static)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(state[0][name])
        before = dict(enumerate(model.parameters()))
        for index, parameter in before.items():
            for key, value in optimizer.state[parameter].items():
                value.copy_(state[1]["state"][index][key]) if index in state[1]["state"] else value.zero_()

    def step(batch: torch.Tensor) -> torch.Tensor:
        static.copy_(batch)
        graph.replay()
        return loss

    return step


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
for name, default in DEFAULTS.items():
    parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, help=" ")
parser.add_argument(
    "--rows", default="", help="a tensor of token rows saved by torch.save; default: the bundled corpus"
)
args = parser.parse_args()
torch.manual_seed(args.seed)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
rows = torch.load(args.rows).long() if args.rows else bundled_corpus(tokenizer, args.seq_len, args.split, args.seed)
rows = rows.to(device)
model = new_model(args, len(tokenizer)).to(device)
decays = [args.position_decay if "wpe" in n else args.weight_decay * (p.ndim > 1) for n, p in model.named_parameters()]
groups = [{"params": [p], "weight_decay": d} for p, d in zip(model.parameters(), decays, strict=True)]
lr = torch.tensor(args.lr, device=device)
optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), capturable=device.type == "cuda")
checkpoint = Path(args.run, "checkpoint.safetensors")
first = load_checkpoint(checkpoint, model, optimizer) if checkpoint.exists() else 0
last = min(args.steps, first + (args.leg_steps or args.steps))
step_on = (
    graphed(model, optimizer, rows[: args.batch_size])
    if device.type == "cuda" and args.graph
    else partial(train_step, model, optimizer)
)
for step in range(first, last):
    lr.fill_(args.lr * min((step + 1) / args.warmup, 1 - step / args.steps))
    loss = step_on(batch_of(rows, args.batch_size, step, args.seed))
    if (step + 1) % args.checkpoint_every == 0 or step + 1 == last:
        print(f"step {step + 1}/{args.steps} loss {loss.item():.3f}", flush=True)
        save_checkpoint(checkpoint, model, optimizer, step + 1)
if last == args.steps:
    model.save_pretrained(args.out)
