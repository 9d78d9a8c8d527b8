"""Train the bundled dense model, a small GPT-2: python examples/train_dense.py --out my_dense

With --leg-steps it stops early, and the same command continues from the checkpoint in the folder --run.
"""

import argparse
import os
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


def new_model(args: argparse.Namespace, vocab_size: int) -> GPT2LMHeadModel:
    sizes = dict(vocab_size=vocab_size, n_positions=args.seq_len, n_embd=args.width, n_layer=args.layers)
    rest = dict(n_head=args.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **rest))
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    return model


def batch_of(rows: torch.Tensor, size: int, step: int, seed: int) -> torch.Tensor:
    epoch, index = divmod(step, len(rows) // size)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch))
    return rows[order[index * size :][:size]]


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
        optimizer.state[parameter] = {k: tensors[f"{name}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
    return int(tensors["steps"])


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
for name, default in DEFAULTS.items():
    parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, help=" ")
args = parser.parse_args()
torch.manual_seed(args.seed)
tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
rows = bundled_corpus(tokenizer, args.seq_len, args.split, args.seed)
model = new_model(args, len(tokenizer))
decays = [args.position_decay if "wpe" in n else args.weight_decay * (p.ndim > 1) for n, p in model.named_parameters()]
groups = [{"params": [p], "weight_decay": d} for p, d in zip(model.parameters(), decays, strict=True)]
optimizer, checkpoint = torch.optim.AdamW(groups, betas=(0.9, 0.95)), Path(args.run, "checkpoint.safetensors")
first = load_checkpoint(checkpoint, model, optimizer) if checkpoint.exists() else 0
last = min(args.steps, first + (args.leg_steps or args.steps))
for step in range(first, last):
    for group in optimizer.param_groups:
        group["lr"] = args.lr * min((step + 1) / args.warmup, 1 - step / args.steps)
    batch = batch_of(rows, args.batch_size, step, args.seed)
    loss = model(batch, labels=batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if (step + 1) % args.checkpoint_every == 0 or step + 1 == last:
        print(f"step {step + 1}/{args.steps} loss {loss.item():.3f}", flush=True)
        save_checkpoint(checkpoint, model, optimizer, step + 1)
if last == args.steps:
    model.save_pretrained(args.out)
