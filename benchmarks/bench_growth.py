"""How a training step grows with depth, width, vocabulary and density, against the one written out.

`python benchmarks/bench_growth.py`

One thing is varied at a time about a small base: 2 layers, d_sparse 512, vocabulary 2,048, density 1/64, 4 rows of 64
tokens, all sites, exact KL. The sparse model trains on a support that is fixed in both steps, so that both do the same.
Each row alternates both steps and the large product (bench_step.py says what the columns mean); in brackets how many
times longer a step takes than in the table's first row.
"""

import argparse

import torch
from measure_step import Case, Figures, caption, measure

BASE = {"layers": 2, "d_sparse": 512, "vocab": 2048, "density": 1 / 64}
BATCH, SEQ = 4, 64
VARIED = {
    "layers": (1, 2, 4, 8),
    "d_sparse": (256, 512, 1024, 2048),
    "vocab": (1024, 2048, 8192, 32_768),
    "density": (1 / 16, 1 / 64, 1 / 256, 1 / 1000),
}


def label(name: str, value: float) -> str:
    """A value in words."""
    return f"1/{1 / value:.0f}" if name == "density" else f"{value:,}"


def row(name: str, value: float, found: Figures, first: Figures) -> str:
    """A line of the table."""
    times = (f"{found.ms[step]:.0f} ({found.ms[step] / first.ms[step]:.1f}x)" for step in ("written out", "ours"))
    share = found.share("ours", found.flop["ours"].total)
    return f"| {label(name, value)} | {' | '.join(times)} | {found.ratio:.2f} | {share:.0%} |"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kind", default="fixed support", help="of step_pair.KINDS")
    parser.add_argument("--varied", nargs="+", choices=VARIED, default=list(VARIED))
    parser.add_argument("--values", type=int, default=4, help="how many values of each, from the first on")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for i, name in enumerate(args.varied):
        print(f"{chr(10) if i else ''}| {name} | written out, ms | ours, ms | ratio | ours: products at the ceiling |")
        print(f"|{'---|' * 5}")
        first = None
        for value in VARIED[name][: args.values]:
            found = measure(Case(args.kind, BASE | {name: value}, BATCH, SEQ), args.rounds, args.device)
            first = first or found
            print(row(name, value, found, first), flush=True)
    print(f"\n{caption([Case(args.kind, BASE)], args.device)}")


if __name__ == "__main__":
    main()
