"""What linear maps can do between SmolLM2 and its pruned self: python benchmarks/linear_limit.py --tokens 24000

Least squares in float64 without AbsTopK and without a penalty, at some sites, in both directions, from half the tokens
and from all. Its NMSE on these tokens themselves and on others bracket what more tokens would give. Tokens far out at a
site (ten times the median distance from the median) and each row's first two are left out. It downloads a model
(examples/get_smollm2.py): not part of `make bench`.
"""

import argparse

import torch
from real_model import ROW_TOKENS, pruned, smollm2, text_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import bridges

SITES = ("20.mlp", "27.mlp", "28.mlp", "29.mlp")
BATCH = 8
FAR = 10
HELDOUT_SHARE = 5
"""One token in so many is held out."""


@torch.no_grad()
def streams(model, rows):
    """{site: stream [tokens, d]} without each row's first two tokens, in float64."""
    residual, found = bridges.as_residual(model), {site: [] for site in SITES}
    indices = [residual.index(site) for site in SITES]
    for start in range(0, len(rows), BATCH):
        trace = residual.trace(rows[start : start + BATCH], with_logits=False, last_site=max(indices))
        for site, index in zip(SITES, indices, strict=True):
            found[site].append(trace.residuals[index][:, 2:].flatten(0, 1))
    return {site: torch.cat(parts).double() for site, parts in found.items()}


def usual(h):
    """True at the tokens that are not far from the others."""
    distance = (h - h.median(0).values).norm(dim=1)
    return distance < FAR * distance.median()


def nmse(weight, inputs, targets):
    """Squared error over variance; a column of ones stands for the bias."""
    error = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1) @ weight - targets
    return (error.square().sum() / (targets - targets.mean(0)).square().sum()).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=24_000)
    arguments = parser.parse_args()
    folder = smollm2()
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = text_rows(AutoTokenizer.from_pretrained(folder), ROW_TOKENS)[: arguments.tokens // ROW_TOKENS]
    of_dense, of_sparse = streams(dense, rows), streams(pruned(dense), rows)
    print("| site | direction | tokens | in-sample | held-out |\n|---|---|---|---|---|")
    for site in SITES:
        kept = usual(of_dense[site]) & usual(of_sparse[site])
        h, z = of_dense[site][kept], of_sparse[site][kept]
        held = len(h) // HELDOUT_SHARE
        for direction, inputs, targets in (("encode", h, z), ("decode", z, h)):
            most = len(h) - held
            for n in (most // 2, most):
                ones = inputs.new_ones(n, 1)
                train = torch.cat([inputs[held : held + n], ones], 1)
                weight = torch.linalg.lstsq(train, targets[held : held + n]).solution
                inside = nmse(weight, inputs[held : held + n], targets[held : held + n])
                outside = nmse(weight, inputs[:held], targets[:held])
                print(f"| {site} | {direction} | {n} | {inside:.3f} | {outside:.3f} |", flush=True)


if __name__ == "__main__":
    main()
