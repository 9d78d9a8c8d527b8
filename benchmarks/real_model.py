"""What a fit, a search or a sweep between real models takes and gives. It downloads one: not part of `make bench`.

    python benchmarks/real_model.py fit --partner pruned          # all sites, defaults: 10 to 20 minutes
    python benchmarks/real_model.py fit --partner self --k 576
    python benchmarks/real_model.py fit --partner small --steps 300 --batch-size 2 --eval-tokens 1024
    python benchmarks/real_model.py find
    python benchmarks/real_model.py sweep

The dense model is SmolLM2-135M-Instruct (examples/get_smollm2.py), or the folder --model. Its partner is itself; a copy
whose attention and MLP matrices have the smaller half of their weights set to zero; or a `SparseTransformer` of two
layers, trained on a little text for 150 steps. Text is the standard library's source. All other arguments are settings
of `fit`. `find` and `sweep` take --bridges, a folder that `fit --out` wrote; without it the bridges are identities,
which cost the same.
"""

import argparse
import resource
import sys
import sysconfig
import time
from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bridges

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from get_smollm2 import smollm2

ROW_TOKENS, SMALL_ROW_TOKENS = 128, 64
TEXT_CHARACTERS = 1_200_000
HELDOUT_ROWS = 32
"""For the small partner, which other rows train."""
WORST = ("nmse_encode", "nmse_decode", "kl_dense_to_sparse", "kl_sparse_to_dense", "massive_share")


def text_rows(tokenizer, row_tokens):
    """Token rows in random order, each after BOS where the tokenizer has one."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(file.read_text(errors="ignore") for file in files)[:TEXT_CHARACTERS]
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    own = row_tokens - len(start)
    ids = ids[: len(ids) // own * own].view(-1, own)
    rows = torch.cat([torch.tensor(start).expand(len(ids), -1).long(), ids], dim=1)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def pruned(model):
    """A copy whose matrices have the smaller half of their weights set to zero."""
    model = deepcopy(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight[weight.abs() <= weight.abs().flatten().kthvalue(weight.numel() // 2).values] = 0
    return model


def small(model, rows, steps=150):
    """A two-layer `SparseTransformer` on the model's tokens, trained for some steps."""
    torch.manual_seed(0)
    config = bridges.SparseConfig(n_layer=2, d_model=256, n_head=16, vocab_size=model.config.vocab_size, block_size=128)
    sparse = bridges.SparseTransformer(config)
    bridges.pretrain(sparse, rows, steps=steps, batch_size=8, lr=3e-3, target_density=1.0, support="projected")
    return sparse.eval()


def identity_bridges(dense, rows):
    """Bridges of identity maps between a model and another of its shape; R is measured on some rows."""
    model = bridges.as_residual(dense)
    with torch.no_grad():
        streams, _ = model.residuals(rows)
    made = []
    for site, stream in enumerate(streams):
        bridge, eye = bridges.Bridge(model.d_model, model.d_model, model.d_model // 4), torch.eye(model.d_model)
        rms = stream[:, 4:].square().mean(-1).sqrt().mean()
        gain = model.norm(site).gain
        values = {"encoder_weight": eye, "decoder_weight": eye, "encoder_bias": 0 * eye[0], "decoder_bias": 0 * eye[0]}
        for name, value in {**values, "rms_dense": rms, "rms_sparse": rms, "gain_sparse": gain}.items():
            getattr(bridge, name).data.copy_(value)
        made.append(bridge)
    return bridges.BridgeSet([(site, site) for site in model.sites], made)


def measured(label, run):
    """Run it, and print what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{label}: {time.perf_counter() - wall:.0f} s, {time.process_time() - cpu:.0f} CPU s with "
        f"{torch.get_num_threads()} threads; peak memory of the process {peak:.2f} GiB",
        flush=True,
    )
    return result


def run_fit(args, settings, dense, tokenizer):
    """Fit and print the report, with the worst site of every figure."""
    rows = text_rows(tokenizer, SMALL_ROW_TOKENS if args.partner == "small" else ROW_TOKENS)
    if args.partner == "small":
        partner = small(dense, rows[:-HELDOUT_ROWS])
        settings, rows = {"eval_data": rows[-HELDOUT_ROWS:], **settings}, rows[:-HELDOUT_ROWS]
    else:
        partner = dense if args.partner == "self" else pruned(dense)
    settings.setdefault("steps", 0)
    fitted = measured(f"fit to {args.partner}", lambda: bridges.fit(dense, partner, rows, **settings))
    report = fitted.report
    print(report)
    for name in WORST:
        site = max(report.sites, key=lambda site: getattr(site, name))
        print(f"worst {name}: {getattr(site, name):.3g} at {site.name}; mean {report.mean[name]:.3g}")
    if report.selection:
        print(f"objective on training rows set aside: {report.selection}")
    if args.out:
        fitted.save_pretrained(args.out)


def run_search(args, dense, tokenizer):
    """Search or sweep with the pruned partner."""
    partner = pruned(dense)
    rows = text_rows(tokenizer, ROW_TOKENS)[:4]
    found = bridges.BridgeSet.from_pretrained(args.bridges) if args.bridges else identity_bridges(dense, rows)
    search = {"find": bridges.find_channels, "sweep": bridges.sweep}[args.what]
    options = {"tokenizer": tokenizer, "check_models": bool(args.bridges), "budget": 1.0}
    label = f"{args.what}, {args.task}, {len(found)} sites"
    result = measured(label, lambda: search(dense, partner, found, args.task, **options))
    print(result if args.what == "sweep" else f"best {result.best}, agreement {result.agreement:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fit", "find", "sweep"))
    parser.add_argument("--model", help="folder of the dense model with its tokenizer; default: SmolLM2, fetched once")
    parser.add_argument("--partner", choices=("self", "pruned", "small"), default="pruned")
    parser.add_argument("--task", default="single_double_quote")
    parser.add_argument("--bridges", help="folder of bridges for find and sweep")
    parser.add_argument("--out", help="folder for the bridges that fit makes")
    args, rest = parser.parse_known_args()
    names = [name.removeprefix("--").replace("-", "_") for name in rest[::2]]
    settings = bridges.FitConfig.from_values(dict(zip(names, rest[1::2], strict=True))).model_dump()
    settings = {name: settings[name] for name in names}
    folder = args.model or smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if args.what == "fit":
        run_fit(args, settings, dense, tokenizer)
    else:
        run_search(args, dense, tokenizer)


if __name__ == "__main__":
    main()
