"""Medians of interleaved runs: every candidate runs once per round, so that a slow moment of the machine hits all.

`torch.utils.benchmark` runs one candidate after another.
"""

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter

import torch


def medians(candidates: Mapping[str, Callable[[], object]], rounds: int = 20) -> dict[str, float]:
    """Median milliseconds of each candidate over `rounds` rounds, after a warm-up round; a GPU is waited for."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, run in candidates.items():
            start = perf_counter()
            run()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times[name].append(1e3 * (perf_counter() - start))
    return {name: median(taken[1:]) for name, taken in times.items()}


def header(what: str, names: Mapping[str, object] | list[str]) -> str:
    """The header lines of a Markdown table whose first column is `what`."""
    columns = [what, *names]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def row(label: str, taken: Mapping[str, float]) -> str:
    """A line of that table: milliseconds, and in brackets the speed relative to the first candidate."""
    first = next(iter(taken.values()))
    return f"| {label} | " + " | ".join(f"{ms:.2f} ({first / ms:.1f}x)" for ms in taken.values()) + " |"
