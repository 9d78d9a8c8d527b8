"""The table over the twenty tasks on the bundled pair: python benchmarks/bench_sweep.py [runs/demo/bridges]

Per task: which part the dense and the sparse model solve, then for the best channel and for the best set of at most
eight P(target) at strength 0 and 1 beside every baseline. The folder of bridges is one that `bridges demo` wrote.
"""

import argparse

import bridges
from bridges.circuits.tasks import TASKS
from bridges.demo import HELDOUT_DOCUMENTS, demo_rows
from bridges.files import write_json

COLUMNS = (
    "task | solved: dense, sparse | edit | P(target) at 0 | at 1 [95 %] | random | mean diff., same norm | probe "
    "| all channels | in the sparse model | side effect, KL | KL before the answer | agreement R2 (shuffled)"
)


def line(found: bridges.Sweep) -> str:
    curve, site, channels, at = found.curves["p_target"], *found.chosen
    one = {name: c.mean[-1] for name, c in found.curves.items()}
    cells = [
        found.task,
        f"{found.accuracy_dense:.0%}, {found.accuracy_sparse:.0%}",
        f"{len(channels)} at {site}, {at}",
        f"{curve.mean[0]:.3f}",
        f"{curve.mean[-1]:.3f} [{curve.low[-1]:.2f}, {curve.high[-1]:.2f}]",
        *(f"{one[f'p_target_{name}']:.3f}" for name in ("random_direction", "mean_difference_equal_norm", "probe")),
        *(f"{one[f'p_target_{name}']:.3f}" for name in ("all_channels", "sparse_model")),
        f"{found.effects.kl:.3f}",
        f"{found.effects.kl_at_cue:.3f}",
        f"{found.agreement.r_squared:.2f} ({found.agreement.r_squared_shuffled:.2f})",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bridges", nargs="?", default="runs/demo/bridges", help="a bridge folder of the bundled pair")
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--rows", type=int, default=16, help="rows of unrelated held-out text")
    parser.add_argument("--out", default=None, help="write every curve here as JSON")
    args = parser.parse_args()
    pair, bridge_set = bridges.load_pair(), bridges.BridgeSet.from_pretrained(args.bridges)
    text = demo_rows(pair, "heldout", HELDOUT_DOCUMENTS, 128, 0)[: args.rows]
    print(f"| {COLUMNS} |\n|{'---|' * (COLUMNS.count('|') + 1)}", flush=True)
    everything = []
    for task in args.tasks:
        for most in (1, 8):
            models = (pair.dense, pair.sparse, bridge_set, task, most)
            found = bridges.sweep(*models, (0.0, 0.5, 1.0), n=args.prompts, tokenizer=pair.tokenizer, text=text)
            print(line(found), flush=True)
            everything.append(found.to_dict())
    if args.out:
        write_json(args.out, everything)


if __name__ == "__main__":
    main()
