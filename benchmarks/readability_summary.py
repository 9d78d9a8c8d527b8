"""What bench_readability.py measures, in rows and in sums: how many tasks are turned, and means of their figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

import bridges
from bridges.objective.pair import SIDES

MOST = 4
"""Channels that a set may have."""
SOLVED = 0.9
"""Part of its prompts that a model must answer for a task to count as solved."""
TURNED, EITHER_WAY = 0.5, 0.3
"""P(target) above which a model counts as turned, and above which each way round does."""
SETS = {"one": "one channel", "four": f"at most {MOST} channels"}
REPORTED = ("nmse_encode", "nmse_decode", "kl_dense_to_sparse", "kl_sparse_to_dense")
COLUMNS = (
    "task | solved: dense, sparse | one channel, sparse alone | one channel for both: sparse, dense | worst way round "
    "| random | off: KL | R2 (shuffled) | at most four for both: sparse, dense | worst way round | random | off: KL "
    "| R2 (shuffled) | changed | seconds of processor time"
)


def row(task: str, of: Mapping[str, Any]) -> str:
    """One line of the table."""
    cells = [task, ", ".join(f"{of['solved'][side]:.0%}" for side in SIDES)]
    cells.append(f"{of['sparse_alone']['p_sparse']:.2f}")
    for name in SETS:
        one = of[name]
        where = f"{len(one['channels'])} at {one['site']}, {one['at']}" if one["channels"] else "none"
        shuffled = one["r_squared_shuffled"]
        cells += [f"{one['p_sparse']:.2f}, {one['p_dense']:.2f} ({where})"]
        cells += [f"{one[figure]:.2f}" for figure in ("worst", "p_random")] + [f"{one['ablation_kl']:.3f}"]
        cells += [f"{one['r_squared']:.2f} ({'-' if shuffled is None else f'{shuffled:.2f}'})"]
    cells.append(", ".join(f"{n} at {site}" for site, n in of["changed"].items() if site in ("0.attn", "1.attn")))
    return f"| {' | '.join(cells)} | {of['cpu_seconds']:.0f} |"


def summary(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of the tasks that are turned, and means and medians: over all tasks, those solved, those turned."""
    records = list(tasks.values())
    counts: dict[str, Any] = {"tasks": len(records)}
    for side in SIDES:
        counts[f"solved_{side}"] = sum(solved(one, side) for one in records)
    counts["sparse_alone"] = {
        "turned": sum(one["sparse_alone"]["p_sparse"] > TURNED for one in records),
        "p_sparse": fmean(one["sparse_alone"]["p_sparse"] for one in records),
    }
    for name in SETS:
        sets = [one[name] for one in records]
        both = [one for one in sets if min(one["p_sparse"], one["p_dense"]) > TURNED]
        figures = ("p_sparse", "p_dense", "worst", "p_random", "ablation_kl", "r_squared")
        counts[name] = {
            "turned_sparse": sum(one["p_sparse"] > TURNED for one in sets),
            "turned_both": len(both),
            "turned_both_either_way": sum(one["worst"] > EITHER_WAY for one in both),
            "none_found": sum(not one["channels"] for one in sets),
            **{figure: fmean(one[figure] for one in sets) for figure in figures},
            "r_squared_shuffled": fmean(one["r_squared_shuffled"] or 0.0 for one in sets),
            "over_solved": {
                figure: mean_of(figure, [one[name] for one in records if solved(one, "sparse")])
                for figure in ("r_squared", "r_squared_shuffled")
            },
            "over_turned": {figure: mean_of(figure, both) for figure in ("p_random", "ablation_kl")},
        }
    for name in ("changed", "changed_per_pair"):
        counts[name] = {site: median(one[name][site] for one in records) for site in records[0][name]}
    for name in ("seconds", "cpu_seconds"):
        counts[name] = fmean(one[name] for one in records)
    return counts


def solved(record: Mapping[str, Any], side: str) -> bool:
    """Whether a model answers enough of a task's prompts."""
    return round(record["solved"][side], 4) >= SOLVED


def mean_of(figure: str, records: Sequence[Mapping[str, Any]]) -> float:
    """Its mean, None counting as 0; NaN of no records."""
    return fmean(one[figure] or 0.0 for one in records) if records else math.nan


def lines(of: Mapping[str, Any], report: Mapping[str, float]) -> list[str]:
    """The summary in words."""
    n, alone = of["tasks"], of["sparse_alone"]
    told = [
        f"{n} tasks; solved by the dense model {of['solved_dense']}, by the sparse model {of['solved_sparse']}",
        f"one channel turns the sparse model alone (P(target) over {TURNED}) on {alone['turned']}; mean P(target) "
        f"{alone['p_sparse']:.3f}",
    ]
    for name, label in SETS.items():
        one = of[name]
        told.append(
            f"{label} for both: over {TURNED} in the sparse model on {one['turned_sparse']}, in both on "
            f"{one['turned_both']}, in both and each way round over {EITHER_WAY} on {one['turned_both_either_way']}; "
            f"none found on {one['none_found']}; means: sparse {one['p_sparse']:.3f}, dense {one['p_dense']:.3f}, "
            f"worst way round {one['worst']:.3f}, random {one['p_random']:.3f}, off: KL {one['ablation_kl']:.3f}, R2 "
            f"{one['r_squared']:.2f} (shuffled {one['r_squared_shuffled']:.2f}); R2 over the tasks that the sparse "
            f"model solves {one['over_solved']['r_squared']:.2f} (shuffled "
            f"{one['over_solved']['r_squared_shuffled']:.2f}); over the tasks that turn both: random "
            f"{one['over_turned']['p_random']:.3f}, off: KL {one['over_turned']['ablation_kl']:.3f}"
        )
    for name, label in (("changed", "over all pairs"), ("changed_per_pair", "by one pair")):
        told.append(f"channels changed {label}, median: {', '.join(f'{n:g} at {s}' for s, n in of[name].items())}")
    told.append("bridges, held-out means: " + ", ".join(f"{name} {value:.3f}" for name, value in report.items()))
    return [*told, f"{of['seconds']:.1f} s a task, {of['cpu_seconds']:.1f} s of processor time"]


def means(report: bridges.BridgeReport) -> dict[str, float]:
    """The figures of a report that pairs are compared by."""
    alone = {name: getattr(report, name) for name in ("kl_sparse_alone", "dense_ce", "sparse_ce")}
    return {**{name: report.mean[name] for name in REPORTED}, **alone}
