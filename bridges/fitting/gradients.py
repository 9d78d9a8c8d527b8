"""The gradients of one training step (method, section 2), backpropagated one hybrid pass at a time to save memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.data.random_state import RandomState, draws_from, random_state
from bridges.models.residual import Trace
from bridges.models.tokens import Batch
from bridges.objective.hybrid import path_kl, single_switch_path, sparse_ce, squared_errors
from bridges.objective.normalizers import BatchMoments, Normalizers, combine_moments, nmse
from bridges.objective.pair import SIDES, ModelPair, Side, Traces, batch_moments, trace_pair
from bridges.objective.sums import Reduce, Sums, no_reduce

SITE_LOSSES = ("nmse_encode", "nmse_decode", "kl_dense_to_sparse", "kl_sparse_to_dense")
"""The losses that every site has of its own."""


class Weights(NamedTuple):
    """w_n, w_ds, w_sd and w_ce of the objective, and the weight of a path that changes sides several times."""

    nmse: float = 1.0
    kl_dense_to_sparse: float = 1.0
    kl_sparse_to_dense: float = 1.0
    ce: float = 1.0
    path: float = 0.0


@dataclass
class StepLosses:
    """The losses of a step by site, over all its micro-batches and processes.

    A KL is given at the sampled sites alone, an NMSE where the target varies.
    """

    nmse_encode: dict[str, float] = field(default_factory=dict)
    nmse_decode: dict[str, float] = field(default_factory=dict)
    kl_dense_to_sparse: dict[str, float] = field(default_factory=dict)
    kl_sparse_to_dense: dict[str, float] = field(default_factory=dict)
    ce: float | None = None
    """The sparse model's own cross-entropy; None where it does not train."""
    kl_path: float | None = None
    """The KL of a path that changes sides several times; None where none is run."""
    loss: float = 0.0
    """The objective."""
    tokens: int = 0
    largest_gradient: float = 0.0
    """The largest magnitude of a gradient's entry; 0 before the trainer has looked."""

    def row(self) -> dict[str, float]:
        """The losses under their metric names."""
        row = {"train/loss": self.loss}
        row |= {f"train/{name}/{site}": value for name in SITE_LOSSES for site, value in getattr(self, name).items()}
        rest = {"train/ce": self.ce, "train/kl_path": self.kl_path}
        return row | {name: value for name, value in rest.items() if value is not None}


class Objective(NamedTuple):
    """What a step minimises, and how its gradients are computed."""

    weights: Weights
    train_sparse: bool = False
    reduce: Reduce = no_reduce
    autocast: Callable[[], AbstractContextManager] = nullcontext
    loss_scale: float = 1.0
    """Static factor on every loss, so that gradients do not underflow in float16; they are divided by it at the end."""

    def backward(self, loss: Float[Tensor, ""], weight: float) -> None:
        """Add the gradient of `weight * loss`."""
        if weight:
            (weight * self.loss_scale * loss).backward()


@dataclass
class StepSums(Sums):
    """The losses of some micro-batches, each already divided by the step's normalizers.

    In float64, on the bridges' device.
    """

    nmse_encode: Float[Tensor, " n_sites"]
    nmse_decode: Float[Tensor, " n_sites"]
    kl_dense_to_sparse: Float[Tensor, " n_sites"]
    kl_sparse_to_dense: Float[Tensor, " n_sites"]
    ce: Float[Tensor, ""]
    kl_path: Float[Tensor, ""]

    @classmethod
    def zeros(cls, pair: ModelPair) -> StepSums:
        """The losses of no batch."""
        bridge_set = pair.bridge_set
        shapes = [(len(bridge_set),)] * len(SITE_LOSSES) + [(), ()]
        device = bridge_set[0].encoder_weight.device
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))


@dataclass
class StepFigures(StepSums):
    """All that the host reads of a step, by one transfer; the losses are of all micro-batches and processes."""

    variance_dense: Float[Tensor, " n_sites"]
    variance_sparse: Float[Tensor, " n_sites"]
    tokens: Float[Tensor, ""]
    largest_gradient: Float[Tensor, ""]
    """As in `StepLosses`."""

    @classmethod
    def of(cls, losses: StepSums, normalizers: Normalizers) -> StepFigures:
        """The figures before the gradients are complete."""
        return cls(
            **vars(losses),
            variance_dense=normalizers.variance_dense.to(losses.device),
            variance_sparse=normalizers.variance_sparse.to(losses.device),
            tokens=normalizers.tokens.to(losses.device),
            largest_gradient=torch.zeros_like(losses.ce),
        )


def step_gradients(
    pair: ModelPair,
    batches: Sequence[Batch],
    sampled: Sequence[int],
    objective: Objective,
    path: Sequence[Side] | None = None,
) -> StepFigures:
    """Add the objective's gradients to the bridges, and to the sparse model if it trains; returns the losses.

    The host does not wait for any of it; `step_losses` reads the losses.
    The reconstruction losses run at every site, the KLs at the `sampled` ones: drawn evenly, these give an unbiased
    gradient. `path`: a hybrid pass that changes sides several times, whose KL counts with the weight `path`. `batches`
    are micro-batches. What the sums are divided by is gathered over all of them and over all processes first, since
    ratios do not add. The caller sums the gradients over processes.
    """
    moments, passes = _forward_passes(pair, batches, objective)
    normalizers = combine_moments(moments, objective.reduce)
    sums = StepSums.zeros(pair)
    for forward in passes:
        _micro_batch(sums, pair, forward(), normalizers, sampled, objective, path)
    if objective.loss_scale != 1:
        _unscale(pair, objective)
    return StepFigures.of(sums.reduced(objective.reduce), normalizers)


def _forward_passes(
    pair: ModelPair, batches: Sequence[Batch], objective: Objective
) -> tuple[list[BatchMoments], list[Callable[[], Traces]]]:
    """The moments of every micro-batch, and functions that give their traces with a graph.

    A single batch is run once. Several are run twice, since their graphs would not fit into memory together; the second
    time draws the dropout masks of the first, so that sums and divisors are of the same streams.
    """
    if len(batches) == 1:
        traces = _trace(pair, batches[0], objective)
        return [batch_moments(pair, traces)], [lambda: traces]
    moments, passes = [], []
    for batch in batches:
        passes.append(partial(_trace_again, pair, batch, objective, random_state(pair.sparse.device)))
        moments.append(batch_moments(pair, _trace(pair, batch, objective, grad=False)))
    return moments, passes


def _trace_again(pair: ModelPair, batch: Batch, objective: Objective, state: RandomState) -> Traces:
    """`_trace` with the random draws that follow `state`; the generators go on from where they are now."""
    with draws_from(state, pair.sparse.device):
        return _trace(pair, batch, objective)


def _trace(pair: ModelPair, batch: Batch, objective: Objective, grad: bool = True) -> Traces:
    """Both models' traces; a graph only through a sparse model that trains."""
    with objective.autocast(), torch.set_grad_enabled(objective.train_sparse and grad):
        return trace_pair(pair, *batch, logits=("dense",))


def _micro_batch(
    sums: StepSums,
    pair: ModelPair,
    traces: Traces,
    normalizers: Normalizers,
    sampled: Sequence[int],
    objective: Objective,
    path: Sequence[Side] | None,
) -> None:
    """Add a micro-batch's part of every loss to the sums, and its gradient; each graph is freed before the next."""
    n, weights = len(pair.bridge_set), objective.weights
    # Losses backpropagate into detached leaves; their gradients are then passed through the sparse model once.
    leaves = [h.detach().requires_grad_(objective.train_sparse) for h in traces.sparse.residuals]
    detached = Traces(_detached(traces.dense), traces.sparse._replace(residuals=leaves))

    for i in range(n):
        with objective.autocast():
            encode, decode = squared_errors(pair, detached, i)
        encode, decode = nmse(encode, normalizers.variance_sparse[i]), nmse(decode, normalizers.variance_dense[i])
        for loss in (encode, decode):
            objective.backward(loss, weights.nmse / n)
        sums.nmse_encode[i] += figure(encode, sums)
        sums.nmse_decode[i] += figure(decode, sums)

    def kl(sides: Sequence[Side], weight: float) -> Tensor:
        with objective.autocast():
            total = path_kl(pair, detached, sides, weight * objective.loss_scale, normalizers.tokens)
        return figure(total, sums) / normalizers.tokens.to(sums.device)

    for i in sampled:
        to_sparse, to_dense = (single_switch_path(n, i, side) for side in SIDES)
        sums.kl_dense_to_sparse[i] += kl(to_sparse, weights.kl_dense_to_sparse / len(sampled))
        sums.kl_sparse_to_dense[i] += kl(to_dense, weights.kl_sparse_to_dense / len(sampled))
    if path is not None:
        sums.kl_path += kl(path, weights.path)
    if objective.train_sparse:
        predictions = normalizers.predictions.clamp(min=1)
        with objective.autocast():
            ce = sparse_ce(pair, detached, weights.ce * objective.loss_scale, predictions)
        sums.ce += figure(ce, sums) / predictions.to(sums.device)
        _backward_through_sparse(traces, leaves)


def figure(loss: Float[Tensor, ""], sums: Sums) -> Float[Tensor, ""]:
    """A loss to add to sums: in float64, on their device, without a graph."""
    return loss.detach().to(sums.device, torch.float64)


def _detached(trace: Trace) -> Trace:
    return trace._replace(residuals=[h.detach() for h in trace.residuals], logits=trace.logits.detach())


def _backward_through_sparse(traces: Traces, leaves: list[Tensor]) -> None:
    """One backward pass through the sparse model, of the gradients at its streams."""
    reached = [(h, leaf.grad) for h, leaf in zip(traces.sparse.residuals, leaves, strict=True) if leaf.grad is not None]
    # A stream that comes from frozen parameters alone has no graph.
    ends = [(h, grad) for h, grad in reached if h.requires_grad]
    torch.autograd.backward([h for h, _ in ends], [grad for _, grad in ends])


def _unscale(pair: ModelPair, objective: Objective) -> None:
    for parameter in trained_parameters(pair, objective.train_sparse):
        if parameter.grad is not None:
            parameter.grad /= objective.loss_scale


def trained_parameters(pair: ModelPair, train_sparse: bool) -> list[torch.nn.Parameter]:
    """The bridges' parameters, then the sparse model's where it trains."""
    sparse = [p for p in pair.sparse.model.parameters() if p.requires_grad] if train_sparse else []
    return [*pair.bridge_set.parameters(), *sparse]


def step_losses(
    pair: ModelPair,
    figures: StepFigures,
    sampled: Sequence[int],
    objective: Objective,
    path: Sequence[Side] | None = None,
) -> StepLosses:
    """The losses by site and the objective, from the figures of a step whose KLs are at the `sampled` sites.

    Waits for the figures. A site whose target does not vary counts as 0.
    """
    sites, weights = pair.bridge_set.sites, objective.weights
    n, figures = len(sites), figures.cpu()

    def by_site(values: Tensor, kept: Iterable[int]) -> dict[str, float]:
        return {sites[i]: values[i].item() for i in kept}

    def varying(variance: Tensor) -> list[int]:
        """The sites where the NMSE is defined."""
        return [i for i, value in enumerate(variance.tolist()) if value != 0]

    losses = StepLosses(
        nmse_encode=by_site(figures.nmse_encode, varying(figures.variance_sparse)),
        nmse_decode=by_site(figures.nmse_decode, varying(figures.variance_dense)),
        kl_dense_to_sparse=by_site(figures.kl_dense_to_sparse, sampled),
        kl_sparse_to_dense=by_site(figures.kl_sparse_to_dense, sampled),
        ce=figures.ce.item() if objective.train_sparse else None,
        kl_path=None if path is None else figures.kl_path.item(),
        tokens=int(figures.tokens),
        largest_gradient=figures.largest_gradient.item(),
    )
    # Means over all sites, or all sampled ones.
    losses.loss = weights.nmse * (sum(losses.nmse_encode.values()) + sum(losses.nmse_decode.values())) / n
    losses.loss += weights.kl_dense_to_sparse * sum(losses.kl_dense_to_sparse.values()) / max(len(sampled), 1)
    losses.loss += weights.kl_sparse_to_dense * sum(losses.kl_sparse_to_dense.values()) / max(len(sampled), 1)
    losses.loss += weights.ce * (losses.ce or 0.0) + weights.path * (losses.kl_path or 0.0)
    return losses
