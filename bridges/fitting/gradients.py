"""The gradients of one training step: the objective of method section 2, one tail's graph alive at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.fitting.interchange import Carried
from bridges.models.residual import Batch
from bridges.objective.hybrid import ModelPair, Side, Traces, batch_moments, ce_sum, kl_sum, squared_errors, trace_pair
from bridges.objective.normalizers import Normalizers, Reduce, combine_moments, no_reduce


class Weights(NamedTuple):
    """w_n, w_ds, w_sd, w_ce and w_i of the objective."""

    nmse: float = 1.0
    kl_dense_to_sparse: float = 1.0
    kl_sparse_to_dense: float = 1.0
    ce: float = 1.0
    interchange: float = 0.0


@dataclass
class StepLosses:
    """What a step measured, summed over micro-batches and processes; KL only at the sampled sites."""

    nmse_encode: dict[str, float] = field(default_factory=dict)
    nmse_decode: dict[str, float] = field(default_factory=dict)
    kl_dense_to_sparse: dict[str, float] = field(default_factory=dict)
    kl_sparse_to_dense: dict[str, float] = field(default_factory=dict)
    interchange: dict[str, float] = field(default_factory=dict)
    ce: float | None = None
    loss: float = 0.0
    tokens: int = 0

    def row(self) -> dict[str, float]:
        """The losses under their metric names."""
        names = ("nmse_encode", "nmse_decode", "kl_dense_to_sparse", "kl_sparse_to_dense", "interchange")
        row = {"train/loss": self.loss}
        row |= {f"train/{name}/{site}": value for name in names for site, value in getattr(self, name).items()}
        return row if self.ce is None else {**row, "train/ce": self.ce}


class Objective(NamedTuple):
    """How a step's gradients are made."""

    weights: Weights
    train_sparse: bool = False
    reduce: Reduce = no_reduce
    autocast: Callable[[], AbstractContextManager] = nullcontext
    loss_scale: float = 1.0
    """Static factor on every loss while gradients pass through float16; divided out again."""
    carried: Sequence[Carried] = ()
    """What the interchange loss asks of every site, on the process that adds it: it knows no batch."""


def step_gradients(
    pair: ModelPair, batches: Sequence[Batch], sampled: Sequence[int], objective: Objective
) -> StepLosses:
    """Add the objective's gradients to the bridges (and to the sparse model where it trains); returns the losses.

    The reconstruction losses run at every site, the KLs at the `sampled` ones: with those drawn evenly the gradient is
    unbiased. `batches` are micro-batches; what the sums are divided by is gathered over all of them and over all
    processes first, since ratios do not add. Gradients are summed over processes by the caller.
    """
    kept = _trace(pair, batches[0], objective) if len(batches) == 1 else None
    shares = [batch_moments(pair, kept or _trace(pair, batch, objective, grad=False)) for batch in batches]
    scale = combine_moments(shares, objective.reduce)
    n = len(pair.bridge_set)
    terms = torch.zeros(5 * n + 1, dtype=torch.float64)
    for i, one in enumerate(objective.carried):
        loss = one.loss(pair.bridge_set[i].decoder_weight)
        terms[4 * n + i] = loss.detach().double().cpu()
        (objective.weights.interchange / n * objective.loss_scale * loss).backward()
    for batch in batches:
        terms += _micro_batch(pair, kept or _trace(pair, batch, objective), scale, sampled, objective)
    if objective.loss_scale != 1:
        _unscale(pair, objective)
    return _losses(pair, objective.reduce(terms), sampled, objective, int(scale.tokens))


def _trace(pair: ModelPair, batch: Batch, objective: Objective, grad: bool = True) -> Traces:
    """Both models' traces; a graph only through a sparse model that trains."""
    with objective.autocast(), torch.set_grad_enabled(objective.train_sparse and grad):
        return trace_pair(pair, *batch)


def _micro_batch(
    pair: ModelPair, traces: Traces, scale: Normalizers, sampled: Sequence[int], objective: Objective
) -> Float[Tensor, " terms"]:
    """Backward of every loss, each freed before the next; the sums, already divided by the step's scale."""
    n, weights = len(pair.bridge_set), objective.weights
    # Each loss stops at a leaf of its own site; what arrives there goes through the sparse model once, at the end.
    leaves = [h.detach().requires_grad_(objective.train_sparse) for h in traces.sparse.residuals]
    cut = Traces(_detached(traces.dense), traces.sparse._replace(residuals=leaves))
    terms = torch.zeros(5 * n + 1, dtype=torch.float64)

    def add(place: int, loss: Tensor, weight: float) -> None:
        terms[place] = loss.detach().double().cpu()
        if weight:
            (weight * objective.loss_scale * loss).backward()

    for i in range(n):
        with objective.autocast():
            encode, decode = squared_errors(pair, cut, i)
        add(i, encode / _divisor(scale.variance_sparse[i]).to(encode), weights.nmse / n)
        add(n + i, decode / _divisor(scale.variance_dense[i]).to(decode), weights.nmse / n)
    directions: list[tuple[Side, int, float]] = [
        ("dense", 2 * n, weights.kl_dense_to_sparse),
        ("sparse", 3 * n, weights.kl_sparse_to_dense),
    ]
    for i in sampled:
        for start, place, weight in directions:
            with objective.autocast():
                loss = kl_sum(pair, cut, i, start)
            add(place + i, loss / scale.tokens.to(loss), weight / len(sampled))
    if objective.train_sparse:
        loss = ce_sum(traces, traces.sparse.logits)
        loss = loss / _divisor(scale.predictions).to(loss.device).float()
        terms[-1] = loss.detach().double().cpu()
        _through_sparse(traces, leaves, weights.ce * objective.loss_scale * loss)
    return terms


def _divisor(total: Tensor) -> Tensor:
    """Infinite where nothing counts or the target does not vary (a step of very short rows): the loss there is 0."""
    return torch.where(total > 0, total, torch.inf)


def _detached(trace):
    return trace._replace(residuals=[h.detach() for h in trace.residuals], logits=trace.logits.detach())


def _through_sparse(traces: Traces, leaves: list[Tensor], ce: Tensor) -> None:
    """One backward through the sparse model for everything that reached its streams, and its own loss."""
    reached = [(h, leaf.grad) for h, leaf in zip(traces.sparse.residuals, leaves, strict=True) if leaf.grad is not None]
    # A stream that comes from frozen parameters alone has no graph.
    ends = [(h, grad) for h, grad in [*reached, (ce, torch.ones_like(ce))] if h.requires_grad]
    torch.autograd.backward([h for h, _ in ends], [grad for _, grad in ends])


def _unscale(pair: ModelPair, objective: Objective) -> None:
    for parameter in trained_parameters(pair, objective.train_sparse):
        if parameter.grad is not None:
            parameter.grad /= objective.loss_scale


def trained_parameters(pair: ModelPair, train_sparse: bool) -> list[torch.nn.Parameter]:
    """The bridges' parameters, then the sparse model's where it trains."""
    sparse = [p for p in pair.sparse.model.parameters() if p.requires_grad] if train_sparse else []
    return [*pair.bridge_set.parameters(), *sparse]


def _losses(pair: ModelPair, terms: Tensor, sampled: Sequence[int], objective: Objective, tokens: int) -> StepLosses:
    sites, n, weights = pair.bridge_set.sites, len(pair.bridge_set), objective.weights
    encode, decode, to_sparse, to_dense, interchange = terms[:-1].view(5, n).tolist()
    losses = StepLosses(
        nmse_encode=dict(zip(sites, encode, strict=True)),
        nmse_decode=dict(zip(sites, decode, strict=True)),
        kl_dense_to_sparse={sites[i]: to_sparse[i] for i in sampled},
        kl_sparse_to_dense={sites[i]: to_dense[i] for i in sampled},
        interchange=dict(zip(sites, interchange, strict=True)) if weights.interchange else {},
        ce=terms[-1].item() if objective.train_sparse else None,
        tokens=tokens,
    )
    losses.loss = weights.nmse * (sum(encode) + sum(decode)) / n
    losses.loss += weights.kl_dense_to_sparse * sum(to_sparse) / len(sampled)
    losses.loss += weights.kl_sparse_to_dense * sum(to_dense) / len(sampled)
    losses.loss += weights.interchange * sum(interchange) / n
    losses.loss += weights.ce * (losses.ce or 0.0)
    return losses
