"""A training step as one CUDA graph: kernels this small take longer to launch one by one than to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class GraphedStep:
    """Records `step(rows)` once, and repeats it on other rows of the same shapes.

    The step must read and write the same tensors each time, wait for nothing, and must have run before (kernels are
    compiled and the optimiser's moments made then). Recording runs nothing.
    """

    def __init__(
        self,
        step: Callable[[Sequence[Int[Tensor, "b s"]]], Sequence[Float[Tensor, ""]]],
        rows: Sequence[Int[Tensor, "b s"]],
        device: torch.device,
    ):
        self._step = step  # what it closes over must live as long as the graph, which reads that memory
        self._rows = [ids.to(device, copy=True) for ids in rows]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = step(self._rows)

    def __call__(self, rows: Sequence[Int[Tensor, "b s"]]) -> list[Float[Tensor, ""]]:
        """Run the step; its results, which the next call leaves alone."""
        for own, ids in zip(self._rows, rows, strict=True):
            own.copy_(ids, non_blocking=True)
        self._graph.replay()
        return [result.clone() for result in self._results]
