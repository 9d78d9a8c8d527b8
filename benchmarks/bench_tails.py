"""Would the tails of several sites be faster as one batch? `python benchmarks/bench_tails.py [--model FOLDER]`

From where a second tail begins, several could run as one batch of more rows. That can gain at most what rows gain by
being more: here the tail from the middle of a model, and its head, of 4 and of 16 rows, per row. The model is the
bundled dense one, the bundled sparse one, or `--model`, such as SmolLM2 (examples/get_smollm2.py). No gradients, as in
`evaluate`.
"""

import argparse

import torch
from timing import medians
from transformers import AutoModelForCausalLM

import bridges
from bridges.models.residual import ResidualModel

ROWS, TIMES = 4, 4
SEQ_LEN = 128


def per_row(model: ResidualModel, rounds: int, rows: int = ROWS, seq_len: int = SEQ_LEN) -> dict[str, float]:
    """Milliseconds per row of a tail of `rows` rows and of `TIMES` times as many, in turns."""
    ids = torch.randint(model.vocab_size, (TIMES * rows, seq_len), generator=torch.Generator().manual_seed(0))
    site = len(model.sites) // 2

    def tail_of(n: int):
        trace = model.trace(ids[:n].to(model.device), with_logits=False, last_site=site)
        return lambda: model.tail(site, trace.residuals[site], trace.context)

    taken = medians({str(n): tail_of(n) for n in (rows, TIMES * rows)}, rounds)
    return {f"{n} rows": ms / int(n) for n, ms in taken.items()}


@torch.no_grad()
def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's folder instead of the bundled pair")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args(arguments)
    pair = bridges.load_pair()
    models = {"bundled dense": pair.dense, "bundled sparse": pair.sparse}
    if args.model:
        models = {args.model.rstrip("/").rpartition("/")[2]: AutoModelForCausalLM.from_pretrained(args.model)}
    print(f"| tail from the middle site, {SEQ_LEN} tokens, ms per row | {ROWS} rows | {TIMES * ROWS} rows | gain |")
    print("|---|---|---|---|")
    for name, model in models.items():
        few, many = per_row(bridges.as_residual(model.eval()), args.rounds).values()
        print(f"| {name} | {few:.2f} | {many:.2f} | {few / many:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
