"""One case of a training step, ours against the one written out: time, operations, share of the ceiling, memory."""

import gc
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from flop import Flop, count_flop, large_product
from step_pair import models, steps


class Case(NamedTuple):
    """What is measured: a kind of `step_pair.KINDS` and the arguments of `models` and `steps`."""

    kind: str
    shape: Mapping[str, Any]
    """Of `models`, with its density."""
    batch: int = 8
    seq: int = 128
    settings: Mapping[str, object] = {}
    """Of `FitConfig`."""

    def __str__(self) -> str:
        layers, d_sparse, density = (self.shape[name] for name in ("layers", "d_sparse", "density"))
        return f"{self.kind}, {layers} layers, d_sparse {d_sparse}, density 1/{1 / density:.0f}"


class Figures(NamedTuple):
    """What was measured, by name of the step: "written out" and "ours"."""

    rows: dict[str, int]
    """Rows of its batch; 0 where the memory does not suffice for one, and the other figures lack it."""
    ms: dict[str, float]
    """Of its fastest step; on a CPU of processor time, on a GPU by the clock until the GPU has finished."""
    flop: dict[str, Flop]
    """Operations of its products."""
    ceiling: float
    """Operations per millisecond of the large product, at its fastest."""
    peak: dict[str, float]
    """MiB on the GPU over what was allocated before its steps; empty on a CPU."""
    seq: int = 128

    @property
    def ratio(self) -> float:
        """How many times more tokens our step does in the same time; NaN where one of them does not fit."""
        return self.tokens_per_second("ours") / self.tokens_per_second("written out")

    def tokens_per_second(self, name: str) -> float:
        """Of the fastest step."""
        return 1e3 * self.rows[name] * self.seq / self.ms[name] if self.rows[name] else math.nan

    def share(self, name: str, operations: int) -> float:
        """The part of the step that so many operations would take at the ceiling."""
        return operations / self.ceiling / self.ms[name] if self.rows[name] else math.nan


def on_gpu(device: str) -> bool:
    """Whether the device is a GPU."""
    return torch.device(device).type == "cuda"


def milliseconds(run: Callable[[], object], device: str) -> float:
    """Of one run: processor time, or on a GPU wall time until it has finished."""
    if not on_gpu(device):
        started = time.process_time()
        run()
        return 1e3 * (time.process_time() - started)
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def affordable_rows(step: Callable[[int], object], rows: int) -> int:
    """The rows that a step's memory suffices for, halved from `rows` on; 0 if one is too many."""
    while rows:
        try:
            step(rows)
            return rows
        except torch.OutOfMemoryError:
            pass
        # Outside the handler, whose traceback keeps the step's tensors.
        rows //= 2
        gc.collect()
        torch.cuda.empty_cache()
    return 0


def measure(case: Case, rounds: int, device: str = "cpu") -> Figures:
    """Alternate both steps and the large product for some rounds, after a warm-up in which operations are counted.

    A step whose batch does not fit into the GPU's memory gets half the rows, and again; one that never fits has no
    figures.
    """
    dense, sparse = models(**case.shape, seq=case.seq, device=device)
    density = case.shape["density"]
    dtype = torch.bfloat16 if case.settings.get("mixed_precision") == "bf16" else torch.float32
    product, operations = large_product(device, dtype)
    with steps(dense, sparse, density, case.kind, batch=case.batch, seq=case.seq, **case.settings) as functions:
        rows, peak = {}, {}
        for name, step in functions.items():  # the first step compiles
            if on_gpu(device):
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                rows[name] = affordable_rows(step, case.batch)
                torch.cuda.reset_peak_memory_stats()
                if rows[name]:
                    step(rows[name])
                peak[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            else:
                rows[name] = case.batch
        runs = {name: lambda name=name: functions[name](rows[name]) for name in functions if rows[name]}
        flop = {name: count_flop(run) for name, run in runs.items()}
        times = {name: [] for name in (*runs, "product")}
        for _ in range(rounds):
            for name, run in {**runs, "product": product}.items():
                times[name].append(milliseconds(run, device))
    fastest = {name: min(taken) for name, taken in times.items()}
    ceiling = operations / fastest.pop("product")
    return Figures(rows, fastest, flop, ceiling, peak, case.seq)


def cells(figures: Figures) -> dict[str, str]:
    """The columns of a table, by their heads."""
    none = Flop(0, 0)
    written, ours = figures.flop.get("written out", none).total, figures.flop.get("ours", none)
    at_ceiling = [
        figures.share("written out", written),
        figures.share("ours", ours.dense),
        figures.share("ours", ours.total),
    ]
    ms = {name: figures.ms.get(name, math.nan) for name in ("written out", "ours")}
    found = {"written out, ms": f"{ms['written out']:.0f}", "ours, ms": f"{ms['ours']:.0f}"}
    if figures.peak:
        names = ("written out", "ours")
        found["rows: written out, ours"] = ", ".join(f"{figures.rows[name]}" for name in names)
        found["tokens/s"] = ", ".join(f"{figures.tokens_per_second(name):,.0f}" for name in names)
        found["peak memory, MiB"] = ", ".join(f"{figures.peak[name]:,.0f}" for name in names)
    return found | {
        "ratio": f"{figures.ratio:.2f}",
        "GFLOP: written out": f"{written / 1e9:.1f}",
        "ours, dense": f"{ours.dense / 1e9:.1f}",
        "ours, nonzeros": f"{ours.nonzeros / 1e9:.2f}",
        "ceiling, GFLOP/s": f"{figures.ceiling / 1e6:,.0f}",
        "products at the ceiling / step: written out": f"{at_ceiling[0]:.0%}",
        "ours, dense alone": f"{at_ceiling[1]:.0%}",
        "ours": f"{at_ceiling[2]:.0%}",
    }
