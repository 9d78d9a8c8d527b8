"""The parts of a training step in a profile: spans about the functions that do them, and what ran inside each.

Times are exclusive: what runs in a span inside another one counts to the inner one alone.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function

from bridges.fitting import gradients
from bridges.fitting.sparse_training import SparseTraining
from bridges.fitting.standardized import StandardizedBridges
from bridges.fitting.trainer import Trainer
from bridges.models.residual import ResidualModel
from bridges.models.sparse.residual import SparseResidual
from bridges.objective import head, hybrid
from bridges.ops.compiled import has_kernel
from bridges.sparsity import projection

SPAN = "part of a step: "
"""What the names of spans in the profile begin with."""
REST = "the rest: checks, figures, waits"
UNKNOWN = "kernels whose launch is not in the profile"
PARTS: dict[str, Sequence[tuple[Any, str]]] = {
    "dense forward": [(ResidualModel, "trace")],
    "sparse forward": [(SparseResidual, "trace")],
    "reconstruction": [(gradients, name) for name in ("batch_moments", "combine_moments", "squared_errors", "nmse")],
    "backward of reconstruction": [(gradients.Objective, "backward")],
    "tails of hybrid passes": [(hybrid, "run_path_to_final")],
    "head and KL": [(hybrid, "backward_from_head")],
    "backward of head and KL": [(head, "_backward")],
    "backward of tails": [],
    "backward of the sparse model": [(gradients, "_backward_through_sparse")],
    "optimisers": [
        (StandardizedBridges, "pull_gradients"),
        (StandardizedBridges, "fold"),
        (torch.optim.AdamW, "step"),
        (SparseTraining, "gather_gradients"),
        (SparseTraining, "step"),
    ],
    "projection or move": [(projection, "project"), (SparseTraining, "_move")],
    REST: [(Trainer, "train_step")],
    UNKNOWN: [],
}
"""The parts of a step in their order, and the functions that do them. "Head and KL" has the sparse model's own
cross-entropy in it, "tails" the bridge that each begins with."""


class Spent(NamedTuple):
    """What one operation or one kernel took."""

    name: str
    """Empty for the time that a part spends in Python, between operations."""
    part: str
    microseconds: float


def _recorded(name_of: Callable[..., str], function: Callable) -> Callable:
    """The function, inside a span of the profile."""

    @wraps(function)
    def run(*args, **kwargs):
        with record_function(name_of(*args)):
            return function(*args, **kwargs)

    return run


def _span(part: str, owner: Any, name: str) -> Callable[..., str]:
    if (owner, name) != (head, "_backward"):
        return lambda *args: SPAN + part
    # From the logits to the stream at `final`, or, given the gradient there, through the tail.
    return lambda tensor, gradient=None: SPAN + (part if gradient is None else "backward of tails")


@contextmanager
def recorded_parts() -> Iterator[None]:
    """Inside, every part of a training step is a span of the profile.

    So is every call of the compiled kernels of AbsTopK, which are no torch operations, under the kernel's name.
    """
    replaced = [(owner, name, _span(part, owner, name)) for part, of in PARTS.items() for owner, name in of]
    if has_kernel(torch.empty(0)):
        from bridges.ops import kernels

        replaced += [(kernels, name, lambda *args, name=name: name) for name in ("topk_mask", "topk_mask_long")]
    # Built before any is replaced: the sparse model inherits `trace` from the class of the dense one.
    with_spans = [(owner, name, _recorded(span, getattr(owner, name))) for owner, name, span in replaced]
    with ExitStack() as stack:
        for owner, name, function in with_spans:
            stack.enter_context(patch.object(owner, name, function))
        yield


def _part_at(spans: Iterable[FunctionEvent]) -> Callable[[float], str]:
    """A function that gives the part that is running at a time: that of the innermost span."""
    ranges = sorted((e.time_range.start, -e.time_range.end, e.name.removeprefix(SPAN)) for e in spans)
    starts = [start for start, _, _ in ranges]

    def part_at(time: float) -> str:
        at = bisect_right(starts, time) - 1
        while at >= 0 and -ranges[at][1] < time:
            at -= 1
        return ranges[at][2] if at >= 0 else REST

    return part_at


def time_spent(events: Sequence[FunctionEvent], on_gpu: bool) -> list[Spent]:
    """What every operation took on the CPU without those inside it, or every kernel, copy and fill on the GPU.

    A part is told by the time, not by the tree of calls: on a GPU backward passes run in a thread of autograd's own,
    while the thread that has the spans waits. A kernel counts to the part that is running where it is launched.
    """
    on_cpu = [e for e in events if e.device_type == DeviceType.CPU]
    part_at = _part_at(e for e in on_cpu if e.name.startswith(SPAN))
    if not on_gpu:
        return [
            Spent("" if e.name.startswith(SPAN) else e.name, part_at(e.time_range.start), e.self_cpu_time_total)
            for e in on_cpu
        ]
    # Operations repeat the time of the kernels that they launch, and spans stand on the GPU's time line as well.
    kernels = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
    # A call of CUDA (or HIP) and the kernel that it launches share a number; operations have numbers of their own.
    launched = {e.id: e.time_range.start for e in on_cpu if e.name.startswith(("cu", "hip"))}
    return [
        Spent(e.name, part_at(launched[e.id]) if e.id in launched else UNKNOWN, e.time_range.elapsed_us())
        for e in kernels
    ]
