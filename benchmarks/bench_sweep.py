"""The table over the twenty tasks on the bundled pair: python benchmarks/bench_sweep.py [runs/demo/bridges]

Per task: which part the dense and the sparse model solve, then P(target) beside every baseline for the channel that
does most to the dense model's answer, for the at most eight that do, and for the at most eight that turn both models.
The folder of bridges is one that `bridges demo` wrote.
"""

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from typing import Any

import bridges
from bridges.channels.search import By
from bridges.demo import HELDOUT_DOCUMENTS, demo_rows
from bridges.io.files import write_json
from bridges.tasks.pairs import TASKS

SEARCHES: dict[str, tuple[int, By]] = {
    "one channel": (1, "dense"),
    "at most eight channels": (8, "dense"),
    "at most eight channels, by both models": (8, "both"),
}
SOLVED, TURNED = 0.9, 0.5
COLUMNS = (
    "task | solved: dense, sparse | edit | P(target) at 0 | at 1 [95 %] | either way round | random "
    "| mean diff., same norm | probe | all channels | in the sparse model | agreement R2 (shuffled) "
    "| off: KL on text, on other tasks, P(target) | added everywhere: KL"
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
        ", ".join(f"{p:.2f}" for p in found.p_target_by_direction),
        *(f"{one[f'p_target_{name}']:.3f}" for name in ("random_direction", "mean_difference_equal_norm", "probe")),
        *(f"{one[f'p_target_{name}']:.3f}" for name in ("all_channels", "sparse_model")),
        f"{found.agreement.r_squared:.2f} ({control(found):.2f})",
        f"{found.effects.kl:.3f}, {found.effects.kl_other_tasks:.3f}, {found.effects.p_target_off:.2f}",
        f"{found.effects.kl_added:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def control(found: bridges.Sweep) -> float:
    """R squared with shuffled channels; not a number where the site has too few to shuffle."""
    shuffled = found.agreement.r_squared_shuffled
    return float("nan") if shuffled is None else shuffled


def summary(name: str, found: Sequence[bridges.Sweep]) -> str:
    """How many of the tasks that the dense model solves are turned, and means over those and over all solved ones."""
    solved = [one for one in found if round(one.accuracy_dense, 4) >= SOLVED]  # it is float32's mean
    turned = [one for one in solved if one.curves["p_target"].mean[-1] > TURNED]
    one_way, both_ways = (sum(of(one.p_target_by_direction) > TURNED for one in solved) for of in (max, min))
    lines = [
        f"{name}: P(target) over {TURNED} on {len(turned)} of {len(solved)} solved tasks, one way round on {one_way}, "
        f"both ways on {both_ways}"
    ]
    for what, of in (("those turned", turned), ("all solved", solved)):
        if of:
            columns = [
                [one.curves["p_target_random_direction"].mean[-1] for one in of],
                [one.curves["p_target_sparse_model"].mean[-1] for one in of],
                [one.agreement.r_squared for one in of],
                [control(one) for one in of],
                [one.effects.kl for one in of],
            ]
            random, inside, r_squared, shuffled, off = (sum(column) / len(of) for column in columns)
            under, slight = sum(p < 0.1 for p in columns[0]), sum(kl < 0.05 for kl in columns[-1])
            both = sum(p < 0.1 and kl < 0.05 for p, kl in zip(columns[0], columns[-1], strict=True))
            channels = sum(len(one.chosen.channels) for one in of) / len(of)
            lines.append(
                f"  mean over {what}: channels {channels:.1f}, random directions {random:.3f} (under 0.1 on {under}), "
                f"the sparse model {inside:.3f}, agreement R2 {r_squared:.2f}, shuffled {shuffled:.2f}, KL of off "
                f"{off:.3f} (under 0.05 on {slight}; with random under 0.1 on {both})"
            )
    return "\n".join(lines)


def sweeps(task: str, folder: str, prompts: int, rows: int) -> list[bridges.Sweep]:
    """One task, searched for in every way."""
    pair, bridge_set = bridges.load_pair(), bridges.BridgeSet.from_pretrained(folder)
    settings: dict[str, Any] = {"n": prompts, "tokenizer": pair.tokenizer}
    settings["text"] = demo_rows(pair, "heldout", HELDOUT_DOCUMENTS, 128, 0)[:rows]
    models = (pair.dense, pair.sparse, bridge_set, task)
    return [bridges.sweep(*models, most, (0.0, 0.5, 1.0), by=by, **settings) for most, by in SEARCHES.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bridges", nargs="?", default="runs/demo/bridges", help="a bridge folder of the bundled pair")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--rows", type=int, default=32, help="rows of held-out text, some to choose on")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", default=None, help="write every curve here as JSON")
    args = parser.parse_args()
    # Inherited by the processes: two of two threads each, on two cores, take several times as long.
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    print(f"| {COLUMNS} |\n|{'---|' * (COLUMNS.count('|') + 1)}", flush=True)
    found = []
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        for of_task in pool.map(sweeps, args.tasks, *map(repeat, (args.bridges, args.prompts, args.rows))):
            print(*map(line, of_task), sep="\n", flush=True)
            found.append(of_task)
    if args.out:
        write_json(args.out, [one.to_dict() for of_task in found for one in of_task])
    for name, of_search in zip(SEARCHES, zip(*found, strict=True), strict=True):
        print(f"\n{summary(name, of_search)}")


if __name__ == "__main__":
    main()
