"""One case of a training step, ours against the one written out: time, operations, share of the ceiling, memory."""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from flop import Flop, ceiling_caption, count_flop, large_product
from step_pair import WITH_A_MOVE, models, steps

from bridges.config import FitConfig


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

    @property
    def dtype(self) -> torch.dtype:
        """Of the step's dense products."""
        return torch.bfloat16 if self.settings.get("mixed_precision") == "bf16" else torch.float32

    @property
    def move_every(self) -> int:
        """Steps from one move of the support to the next, where it moves."""
        return int(self.settings.get("move_every", FitConfig.model_fields["move_every"].default))


def caption(cases: Sequence[Case], device: str) -> str:
    """What figures of cases of one dtype are of: the ceiling's product, and the share of moves where supports move."""
    moving = next((case for case in cases if case.kind == "moving support"), None)
    share = (
        ""
        if moving is None
        else (
            f" Moving support: one step in {moving.move_every} ends in a move; ours is a step between two moves, and 1/"
            f"{moving.move_every} of what a step with a move takes and multiplies beyond that."
        )
    )
    return ceiling_caption(device, cases[0].dtype) + share


class Figures(NamedTuple):
    """What was measured, by name of the step: "written out" and "ours"."""

    rows: dict[str, int]
    """Rows of its batch; 0 where the memory does not suffice for one, and the other figures lack it."""
    ms: dict[str, float]
    """Of its fastest step, with its share of a move where the support moves; on a CPU of processor time, on a GPU by
    the clock until the GPU has finished."""
    flop: dict[str, Flop]
    """Operations of its products, with the same share."""
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


def rows_and_peak(step: Callable[[int], object], batch: int, device: str) -> tuple[int, float | None]:
    """The rows of a batch that a step's memory suffices for, and MiB at its peak; the batch and None on a CPU."""
    if not on_gpu(device):
        return batch, None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rows = affordable_rows(step, batch)
    torch.cuda.reset_peak_memory_stats()
    if rows:
        step(rows)
    return rows, (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(case: Case, rounds: int, device: str = "cpu") -> Figures:
    """Alternate both steps and the large product for some rounds, after a warm-up in which operations are counted.

    A step whose batch does not fit into the GPU's memory gets half the rows, and again; one that never fits has no
    figures. Where the support moves, a step that ends in a move is measured beside the usual one, and its share added.
    """
    dense, sparse = models(**case.shape, seq=case.seq, device=device)
    density = case.shape["density"]
    product, operations = large_product(device, case.dtype)
    with steps(dense, sparse, density, case.kind, batch=case.batch, seq=case.seq, **case.settings) as functions:
        with_a_move = functions.pop(WITH_A_MOVE, None)
        heaviest = functions | ({} if with_a_move is None else {"ours": with_a_move})
        fitting = {name: rows_and_peak(step, case.batch, device) for name, step in heaviest.items()}
        rows = {name: found for name, (found, _) in fitting.items()}
        peak = {name: mib for name, (_, mib) in fitting.items() if mib is not None}
        runs = {name: partial(step, rows[name]) for name, step in functions.items() if rows[name]}
        if with_a_move is not None and rows["ours"]:
            runs[WITH_A_MOVE] = partial(with_a_move, rows["ours"])
        # The warm-up as well: the first step compiles.
        flop = {name: count_flop(run) for name, run in runs.items()}
        times = {name: [] for name in (*runs, "product")}
        for _ in range(rounds):
            for name, run in {**runs, "product": product}.items():
                times[name].append(milliseconds(run, device))
    fastest = {name: min(taken) for name, taken in times.items()}
    ceiling = operations / fastest.pop("product")
    if WITH_A_MOVE in runs:
        ms, found = fastest.pop(WITH_A_MOVE), flop.pop(WITH_A_MOVE)
        fastest["ours"] = with_share(fastest["ours"], ms, case.move_every)
        flop["ours"] = Flop(
            *(round(with_share(*both, case.move_every)) for both in zip(flop["ours"], found, strict=True))
        )
    return Figures(rows, fastest, flop, ceiling, peak, case.seq)


def with_share(usual: float, with_a_move: float, every: int) -> float:
    """The mean of a step where one in `every` ends in a move.

    >>> with_share(100, 350, every=25)
    110.0
    """
    return usual + (with_a_move - usual) / every


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
