"""The best state of a run: the objective on a slice of the training rows, at the start and at intervals.

Gradient steps may make bridges worse: a learning rate too large for a pair of models, or too few tokens. `fit` returns
the state of the least objective on rows that it did not train on, its start included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bridges.fitting.gradients import Objective, StepFigures, StepSums, figure, step_losses
from bridges.models.modes import eval_mode
from bridges.models.tokens import Batch
from bridges.objective.hybrid import path_kl, single_switch_path, squared_errors
from bridges.objective.normalizers import combine_moments, nmse
from bridges.objective.pair import SIDES, ModelPair, Traces, batch_moments, empty_moments, trace_pair

TOKENS = 2048
"""Tokens of the slice, at most."""
KL_SITES = 8
"""Sites whose KLs are measured, at most: evenly spaced, the first and the last among them."""
TIMES = 10
"""Measurements during a run, besides the one at the start."""


class BestState(NamedTuple):
    """The state of the least objective so far."""

    step: int
    objective: float
    start: float
    """The objective before the first step."""
    tensors: Mapping[str, Tensor] | None = None
    """The bridges' tensors; None where they are the present ones."""

    def summary(self) -> dict[str, float | int]:
        """What the report says of it."""
        return {"step": self.step, "objective": self.objective, "objective_at_start": self.start}


class Selection:
    """Measures the objective of a pair on this process's part of the slice, and keeps the best state."""

    def __init__(self, pair: ModelPair, batches: Sequence[Batch], objective: Objective, best: BestState | None = None):
        self.pair, self.batches, self.objective = pair, batches, objective
        self.best = best
        n = len(pair.bridge_set)
        count = min(KL_SITES, n)
        self.kl_sites = sorted({round(i * (n - 1) / max(count - 1, 1)) for i in range(count)})

    @torch.no_grad()
    def measure(self) -> float:
        """The objective: NMSE at every site, both KLs at `kl_sites`, in evaluation mode."""
        pair, reduce = self.pair, self.objective.reduce
        moments, sums = [], StepSums.zeros(pair)
        with eval_mode(pair.dense.model), eval_mode(pair.sparse.model):
            for batch in self.batches:
                with self.objective.autocast():
                    traces = trace_pair(pair, *batch, logits=("dense",))
                moments.append(batch_moments(pair, traces))
                self._add(sums, traces)
        normalizers = combine_moments(moments or [empty_moments(pair)], reduce)
        sums = sums.reduced(reduce)
        tokens = normalizers.tokens.clamp(min=1).to(sums.device)
        losses = replace(
            sums,
            nmse_encode=nmse(sums.nmse_encode, normalizers.variance_sparse.to(sums.device)),
            nmse_decode=nmse(sums.nmse_decode, normalizers.variance_dense.to(sums.device)),
            kl_dense_to_sparse=sums.kl_dense_to_sparse / tokens,
            kl_sparse_to_dense=sums.kl_sparse_to_dense / tokens,
        )
        return step_losses(pair, StepFigures.of(losses, normalizers), self.kl_sites, self.objective).loss

    def _add(self, sums: StepSums, traces: Traces) -> None:
        """Add a batch's squared errors and KLs, not yet divided by anything."""
        with self.objective.autocast():
            for i in range(len(self.pair.bridge_set)):
                encode, decode = squared_errors(self.pair, traces, i)
                sums.nmse_encode[i] += figure(encode, sums)
                sums.nmse_decode[i] += figure(decode, sums)
            n = len(self.pair.bridge_set)
            for i in self.kl_sites:
                to_sparse, to_dense = (path_kl(self.pair, traces, single_switch_path(n, i, side)) for side in SIDES)
                sums.kl_dense_to_sparse[i] += figure(to_sparse, sums)
                sums.kl_sparse_to_dense[i] += figure(to_dense, sums)

    def observe(self, step: int) -> float:
        """Measure the present state, and keep it if it is the best so far; returns its objective.

        Raises FloatingPointError if the first objective is not finite.
        """
        value = self.measure()
        if self.best is None:
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the objective on the training rows set aside is {value} before the first step, so that no state "
                    "could be chosen; look for tokens among the last training rows that make a model overflow"
                )
            self.best = BestState(step, value, value)
        elif value < self.best.objective or math.isnan(self.best.objective):  # NaN: of a run of an earlier version
            self.best = BestState(step, value, self.best.start)
        return value

    def keep(self) -> None:
        """Copy the best state's tensors before the next step changes them."""
        if self.best is not None and self.best.tensors is None:
            tensors = {name: tensor.detach().clone() for name, tensor in self.pair.bridge_set.tensors().items()}
            self.best = self.best._replace(tensors=tensors)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the bridges the best state."""
        if self.best is not None and self.best.tensors is not None:
            for name, tensor in self.pair.bridge_set.tensors().items():
                tensor.copy_(self.best.tensors[name])


def interval(steps: int) -> int:
    """Steps between two measurements."""
    return max(1, -(-steps // TIMES))
