"""Seconds of every part of a fit on a small batch, from which the plan tells how long the whole takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.config import FitConfig
from bridges.fitting.channel_effects import decoder_freedoms
from bridges.fitting.gradients import Objective, Weights, step_gradients, trained_parameters
from bridges.fitting.ridge import Moments
from bridges.fitting.standardized import StandardizedBridges
from bridges.models.modes import eval_mode
from bridges.models.tokens import Batch
from bridges.objective.hybrid_figures import Hybrids
from bridges.objective.pair import ModelPair, residuals_at, trace_pair
from bridges.objective.reconstruction import Reconstruction

TIMED_WIDTH = 1024
"""The largest matrix whose eigendecomposition is timed; larger ones take the cube of the width's ratio as long."""


class Timings(NamedTuple):
    """Seconds on the timed batch."""

    streams: float
    """Both models' streams, without their heads."""
    moments: float
    """One site's moments."""
    effects: float
    """The effects of all sparse channels at every site; 0 where they are not asked for."""
    solve: float
    """One site's regressions, whatever the tokens."""
    reconstruction: float
    """One site's NMSEs."""
    hybrids: float
    """One site's two hybrid passes and two ablated ones."""
    forward: float
    """Both models' forward passes with their heads, without a graph."""
    step_base: float
    """A step without KLs."""
    step_site: float
    """What the KLs of one more site add to it."""
    update: float
    """One bridge's optimiser step, whatever the tokens."""

    @classmethod
    def measure(cls, pair: ModelPair, config: FitConfig, batch: Batch) -> Timings:
        """Time each part once, after a first run that compiles and allocates."""
        n = len(pair.bridge_set)
        middle = n // 2
        one_site = ModelPair(
            pair.dense, pair.sparse, BridgeSet([pair.bridge_set.site_pairs[middle]], [pair.bridge_set[middle]])
        )
        with eval_mode(pair.dense.model), eval_mode(pair.sparse.model), torch.no_grad():
            streams = _time(lambda: trace_pair(pair, *batch, logits=()), pair)
            traces = trace_pair(pair, *batch, logits=("dense",))
            h_dense, h_sparse = (h.flatten(0, 1) for h in residuals_at(pair, traces, middle))
            found = Moments(h_dense.double().mean(0), h_sparse.double().mean(0))
            moments = _time(lambda: found.update(h_dense, h_sparse), pair)
            solve = _solve_seconds(pair, config) if config.closed_form else 0.0
            effects = _time(lambda: decoder_freedoms(pair, [batch]), pair) if _asks_for_effects(config) else 0.0
            reconstruction = _time(lambda: Reconstruction(one_site).add(traces), pair)
            means = Reconstruction(one_site).means()
            hybrids = _time(lambda: list(Hybrids(one_site, means).add(traces)), pair)
        if not config.steps:
            return cls(streams, moments, effects, solve, reconstruction, hybrids, 0.0, 0.0, 0.0, 0.0)
        with torch.no_grad():
            forward = _time(lambda: trace_pair(pair, *batch), pair)
        objective = Objective(Weights(), config.train_sparse)
        base, with_site = (
            _time(lambda sites=sites: step_gradients(pair, [batch], sites, objective), pair)
            for sites in ([middle] * 0, [middle])
        )
        update = _update_seconds(pair)
        for parameter in trained_parameters(pair, config.train_sparse):
            parameter.grad = None
        site = max(with_site - base, 0.0)
        return cls(streams, moments, effects, solve, reconstruction, hybrids, forward, base, site, update)


def _asks_for_effects(config: FitConfig) -> bool:
    return config.closed_form and config.decoder_attribution == "effect"


def _time(run: Callable[[], object], pair: ModelPair) -> float:
    """Seconds of the faster of two runs."""
    seconds = []
    for _ in range(2):
        _wait(pair)
        started = time.perf_counter()
        run()
        _wait(pair)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _wait(pair: ModelPair) -> None:
    """Wait for what was started on the models' GPUs."""
    for device in {pair.dense.device, pair.sparse.device}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _solve_seconds(pair: ModelPair, config: FitConfig) -> float:
    """Both regressions of one site: two eigendecompositions, or two factorisations, in float64."""
    total = 0.0
    for width in (pair.dense.d_model, pair.sparse.d_model):
        timed = min(width, TIMED_WIDTH)
        matrix = torch.eye(timed, dtype=torch.float64, device=pair.bridge_set[0].encoder_weight.device)
        # Not diagonal, which would be too easy.
        matrix = matrix + torch.rand(timed, timed, dtype=torch.float64).to(matrix).cov() / timed

        def solve(matrix: Tensor = matrix) -> None:
            torch.cholesky_solve(matrix, torch.linalg.cholesky(matrix))
            if config.ridge == "auto":
                values, product = torch.linalg.eigh(matrix)
                for _ in range(4):  # as many products as choosing takes
                    product = product.T @ matrix * values

        total += _time(solve, pair) * (width / timed) ** 3
    return total


def _update_seconds(pair: ModelPair) -> float:
    """One bridge's part of an optimiser step."""
    one = BridgeSet([pair.bridge_set.site_pairs[0]], [pair.bridge_set[0]])
    for parameter in one.parameters():
        parameter.grad = torch.zeros_like(parameter)
    maps = StandardizedBridges(one)
    optimizer = torch.optim.AdamW(maps.parameter_groups(0.0), weight_decay=0.0)
    plain = [parameter.detach().clone() for parameter in one.parameters()]

    def step() -> None:
        maps.pull_gradients()
        optimizer.step()
        maps.fold()

    seconds = _time(step, pair)
    with torch.no_grad():  # folding may round
        for parameter, before in zip(one.parameters(), plain, strict=True):
            parameter.copy_(before)
    return seconds
