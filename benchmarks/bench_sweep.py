"""The table over the twenty tasks on the bundled pair: python benchmarks/bench_sweep.py [runs/demo/bridges]

Per task: which part of the prompts the dense and the sparse model solve, then P(target) and every baseline for the
channel that does most to the dense model's answer, for at most eight that do, and for at most eight that turn both
models; "none within budget" where a search finds none. The folder of bridges is one that `bridges demo` wrote.
"""

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from typing import Any, NamedTuple

import bridges
from bridges.channels.search import By, NoChannelsFoundError
from bridges.config import DEFAULT_SEQ_LEN
from bridges.demo import HELDOUT_DOCUMENTS, demo_rows
from bridges.io.files import write_json
from bridges.tasks.pairs import TASKS

SEARCHES: dict[str, tuple[int, By]] = {
    "one channel": (1, "dense"),
    "at most eight channels": (8, "dense"),
    "at most eight channels, by both models": (8, "both"),
}
SOLVED = 0.9
"""Part of its prompts that a model must answer for a task to count as solved."""
TURNED = 0.5
"""P(target) at strength 1 above which an edit counts as turning the answer."""
SLIGHT_KL, WEAK_CONTROL = 0.05, 0.1
"""Below these an ablation costs little, and random directions do little."""
COLUMNS = (
    "task | solved: dense, sparse | edit | P(target) at 0 | at 1 [95 %] | either way round | random "
    "| mean diff., same norm | probe | all channels | in the sparse model | agreement R2 (shuffled) "
    "| off: KL on text, on other tasks, P(target) | added everywhere: KL"
)


class NoneFound(NamedTuple):
    """A search that found no channels, and why."""

    task: str
    reason: str


Result = bridges.Sweep | NoneFound


def row(result: Result) -> str:
    """One line of the table."""
    if isinstance(result, NoneFound):
        return f"| {result.task} | | none within budget ({result.reason}) |{' |' * (COLUMNS.count('|') - 2)}"
    curve, site, channels, at = result.curves["p_target"], *result.chosen
    at_one = {name: c.mean[-1] for name, c in result.curves.items()}
    cells = [
        result.task,
        f"{result.accuracy_dense:.0%}, {result.accuracy_sparse:.0%}",
        f"{len(channels)} at {site}, {at}",
        f"{curve.mean[0]:.3f}",
        f"{curve.mean[-1]:.3f} [{curve.low[-1]:.2f}, {curve.high[-1]:.2f}]",
        ", ".join(f"{p:.2f}" for p in result.p_target_by_direction),
        *(f"{at_one[f'p_target_{name}']:.3f}" for name in ("random_direction", "mean_difference_equal_norm", "probe")),
        *(f"{at_one[f'p_target_{name}']:.3f}" for name in ("all_channels", "sparse_model")),
        f"{result.agreement.r_squared:.2f} ({shuffled_r_squared(result):.2f})",
        f"{result.effects.kl:.3f}, {result.effects.kl_other_tasks:.3f}, {result.effects.p_target_off:.2f}",
        f"{result.effects.kl_added:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def shuffled_r_squared(result: bridges.Sweep) -> float:
    """R squared with shuffled channels; NaN where the site has too few to shuffle."""
    r_squared = result.agreement.r_squared_shuffled
    return float("nan") if r_squared is None else r_squared


def summary(name: str, results: Sequence[Result]) -> str:
    """How many of the tasks that the dense model solves are turned, and means over those and over all solved ones."""
    found = [one for one in results if isinstance(one, bridges.Sweep)]
    solved = [one for one in found if round(one.accuracy_dense, 4) >= SOLVED]  # rounded: it is a float32 mean
    turned = [one for one in solved if one.curves["p_target"].mean[-1] > TURNED]
    one_way, both_ways = (sum(of(one.p_target_by_direction) > TURNED for one in solved) for of in (max, min))
    lines = [
        f"{name}: P(target) over {TURNED} on {len(turned)} of {len(solved)} solved tasks with channels, one way round "
        f"on {one_way}, both ways on {both_ways}; none within budget on {len(results) - len(found)}"
    ]
    lines += [
        f"  mean over {which}: {means(of)}" for which, of in (("those turned", turned), ("all solved", solved)) if of
    ]
    return "\n".join(lines)


def means(of: Sequence[bridges.Sweep]) -> str:
    """The figures of several sweeps at the last strength, averaged."""
    columns = [
        [one.curves["p_target_random_direction"].mean[-1] for one in of],
        [one.curves["p_target_sparse_model"].mean[-1] for one in of],
        [one.agreement.r_squared for one in of],
        [shuffled_r_squared(one) for one in of],
        [one.effects.kl for one in of],
    ]
    random, in_sparse, r_squared, shuffled, ablation_kl = (sum(column) / len(of) for column in columns)
    weak = [p < WEAK_CONTROL for p in columns[0]]
    slight = [kl < SLIGHT_KL for kl in columns[-1]]
    both = sum(w and s for w, s in zip(weak, slight, strict=True))
    channels = sum(len(one.chosen.channels) for one in of) / len(of)
    return (
        f"channels {channels:.1f}, random directions {random:.3f} (under {WEAK_CONTROL} on {sum(weak)}), the sparse "
        f"model {in_sparse:.3f}, agreement R2 {r_squared:.2f}, shuffled {shuffled:.2f}, KL of off {ablation_kl:.3f} "
        f"(under {SLIGHT_KL} on {sum(slight)}; with random under {WEAK_CONTROL} on {both})"
    )


def sweeps(task: str, folder: str, prompts: int, rows: int) -> list[Result]:
    """One task, searched for in every way."""
    pair, bridge_set = bridges.load_pair(), bridges.BridgeSet.from_pretrained(folder)
    settings: dict[str, Any] = {"n": prompts, "tokenizer": pair.tokenizer}
    settings["text"] = demo_rows(pair, "heldout", HELDOUT_DOCUMENTS, DEFAULT_SEQ_LEN, 0)[:rows]
    results: list[Result] = []
    for most, by in SEARCHES.values():
        try:
            models = (pair.dense, pair.sparse, bridge_set)
            results.append(bridges.sweep(*models, task, most, (0.0, 0.5, 1.0), by=by, **settings))
        except NoChannelsFoundError as error:
            results.append(NoneFound(task, str(error)))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bridges", nargs="?", default="runs/demo/bridges", help="a bridge folder of the bundled pair")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--rows", type=int, default=32, help="rows of held-out text, some to choose on")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", default=None, help="write every curve here as JSON")
    args = parser.parse_args()
    # The processes inherit this: with two threads each they take several times as long on two cores.
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    print(f"| {COLUMNS} |\n|{'---|' * (COLUMNS.count('|') + 1)}", flush=True)
    found = []
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        for of_task in pool.map(sweeps, args.tasks, *map(repeat, (args.bridges, args.prompts, args.rows))):
            print(*map(row, of_task), sep="\n", flush=True)
            found.append(of_task)
    if args.out:
        results = [one for of_task in found for one in of_task]
        write_json(args.out, [one.to_dict() if isinstance(one, bridges.Sweep) else one._asdict() for one in results])
    for name, of_search in zip(SEARCHES, zip(*found, strict=True), strict=True):
        print(f"\n{summary(name, of_search)}")


if __name__ == "__main__":
    main()
