"""Hybrid passes and the losses on them (paper A.3; method, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bridges.bridge import BridgeSet
from bridges.models.loading import as_residual
from bridges.models.modes import frozen
from bridges.models.residual import ResidualModel, Trace, check_tokens
from bridges.objective.normalizers import BatchMoments, combine_moments, counted_tokens, predicting, stream_moments
from bridges.ops.kl import kl_divergence

Side = Literal["dense", "sparse"]
SIDES: tuple[Side, Side] = ("dense", "sparse")


class HybridLosses(NamedTuple):
    """One entry per bridged site; NMSE as a fraction of the target's variance, KL in nats per token."""

    nmse_encode: Float[Tensor, " n_sites"]
    nmse_decode: Float[Tensor, " n_sites"]
    kl_dense_to_sparse: Float[Tensor, " n_sites"]
    kl_sparse_to_dense: Float[Tensor, " n_sites"]


class ModelPair(NamedTuple):
    """Two models and the bridges between them."""

    dense: ResidualModel
    sparse: ResidualModel
    bridge_set: BridgeSet

    def model(self, side: Side) -> ResidualModel:
        """The model of one side."""
        return self.dense if side == "dense" else self.sparse

    def site(self, side: Side, bridge: int) -> int:
        """The index, in one side's model, of the site that a bridge joins."""
        return self.model(side).index(self.bridge_set.site_pairs[bridge][side == "sparse"])


class Traces(NamedTuple):
    """One batch through both models, each by itself."""

    dense: Trace
    sparse: Trace

    def side(self, side: Side) -> Trace:
        """The trace of one side."""
        return self.dense if side == "dense" else self.sparse


def run_path(pair: ModelPair, traces: Traces, path: Sequence[Side]) -> Float[Tensor, "b s vocab"]:
    """Logits of the hybrid pass in which `path[j]` runs the stretch before bridged site j, the last entry the end.

    Where the side changes, the stream crosses the bridge there: f from dense to sparse, g from sparse to dense. What
    comes before the first change is one model by itself, so it is taken from `traces`.
    """
    n = len(pair.bridge_set)
    first = next((j for j in range(n) if path[j] != path[j + 1]), None)
    if first is None:
        return traces.side(path[0]).logits
    stream = traces.side(path[first]).residuals[pair.site(path[first], first)]
    for j in range(first, n):
        if path[j] != path[j + 1]:
            bridge = pair.bridge_set[j]
            stream = stream.to(bridge.encoder_weight.device)
            crossed = bridge.encode(stream) if path[j + 1] == "sparse" else bridge.decode(stream)
            stream = crossed.to(pair.model(path[j + 1]).device, pair.model(path[j + 1]).dtype)
        model, context = pair.model(path[j + 1]), traces.side(path[j + 1]).context
        here = pair.site(path[j + 1], j)
        if j == n - 1:
            return model.tail(here, stream, context)
        stream = model.run(here, pair.site(path[j + 1], j + 1), stream, context)
    raise AssertionError("a path ends at the logits")


def single_switch_path(n_sites: int, bridge: int, start: Side) -> tuple[Side, ...]:
    """The path that begins on side `start` and changes once, at `bridge`."""
    end: Side = "sparse" if start == "dense" else "dense"
    return (start,) * (bridge + 1) + (end,) * (n_sites - bridge)


def kl_sum(pair: ModelPair, traces: Traces, bridge: int, start: Side) -> Float[Tensor, ""]:
    """sum over real tokens of KL(y^d || hybrid pass that crosses at `bridge`), nats."""
    logits = run_path(pair, traces, single_switch_path(len(pair.bridge_set), bridge, start))
    return kl_of(traces, logits)


def kl_of(traces: Traces, logits: Float[Tensor, "b s vocab"]) -> Float[Tensor, ""]:
    """sum over real tokens of KL(y^d || softmax(logits)), nats."""
    target = traces.dense.logits.detach().to(logits.device)
    mask = traces.dense.context.attention_mask
    if mask is None:
        return kl_divergence(target.flatten(0, 1), logits.flatten(0, 1))
    real = mask.bool().to(logits.device)
    return kl_divergence(target[real], logits[real])


def ce_sum(traces: Traces, logits: Float[Tensor, "b s vocab"]) -> Float[Tensor, ""]:
    """sum of next-token cross-entropy over real tokens that a real one follows, nats, in at least float32."""
    ids, mask = traces.dense.context.input_ids.to(logits.device), traces.dense.context.attention_mask
    there = predicting(ids, mask if mask is None else mask.to(logits.device))
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits[:, :-1][there].to(wide), ids[:, 1:][there], reduction="sum")


def squared_errors(pair: ModelPair, traces: Traces, bridge: int) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The numerators of nmse_encode and nmse_decode at one site: sum |p - t|^2 over counted tokens and channels."""
    h_dense, h_sparse = residuals_at(pair, traces, bridge)
    counted = counted_tokens(traces.dense.context.input_ids, traces.dense.context.attention_mask)
    maps = pair.bridge_set[bridge]
    # The encoder's target gets no gradient: the sparse model would learn to be easy to predict.
    return (
        _squared(maps.encode(h_dense), h_sparse.detach(), counted),
        _squared(maps.decode(h_sparse), h_dense.detach(), counted),
    )


def residuals_at(pair: ModelPair, traces: Traces, bridge: int) -> tuple[Tensor, Tensor]:
    """The dense and the sparse stream [batch, seq, d_model] at one bridged site."""
    dense = traces.dense.residuals[pair.site("dense", bridge)]
    sparse = traces.sparse.residuals[pair.site("sparse", bridge)]
    device = pair.bridge_set[bridge].encoder_weight.device
    return dense.to(device), sparse.to(device)


def _squared(prediction: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    # Padding may hold anything, NaN included, so it is left out rather than multiplied by zero. Under autocast the
    # prediction may be float16, in which squares over 65504 overflow.
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(wide) - target.to(wide))[counted.to(prediction.device)].square().sum()


def batch_moments(pair: ModelPair, traces: Traces) -> BatchMoments:
    """This batch's share of what the losses are divided by."""
    streams = [residuals_at(pair, traces, i) for i in range(len(pair.bridge_set))]
    return stream_moments(streams, traces.dense.context.input_ids, traces.dense.context.attention_mask)


def empty_moments(pair: ModelPair) -> BatchMoments:
    """The share of a process that has no batch: no tokens, zero means."""
    devices = [bridge.encoder_weight.device for bridge in pair.bridge_set]
    widths = (pair.dense.d_model, pair.sparse.d_model)
    means = [tuple(torch.zeros(width, dtype=torch.float64, device=device) for width in widths) for device in devices]
    squares = [tuple(torch.zeros((), dtype=torch.float64, device=device) for _ in widths) for device in devices]
    return BatchMoments(0, 0, 0, means, squares)  # pyright: ignore[reportArgumentType]


def trace_pair(
    pair: ModelPair, input_ids: Tensor, attention_mask: Tensor | None = None, differentiable: bool = False
) -> Traces:
    """One batch through both models, each on its own device."""

    def on(model: ResidualModel) -> Trace:
        mask = attention_mask if attention_mask is None else attention_mask.to(model.device)
        return model.trace(input_ids.to(model.device), mask, differentiable)

    return Traces(on(pair.dense), on(pair.sparse))


def hybrid_losses(
    dense: nn.Module | ResidualModel,
    sparse: nn.Module | ResidualModel,
    bridge_set: BridgeSet,
    input_ids: Int[Tensor, "b s"],
    attention_mask: Int[Tensor, "b s"] | None = None,
    sites: Sequence[str] | None = None,
    *,
    check_models: bool = True,
) -> HybridLosses:
    """The four losses of method section 2 at every bridged site, or at `sites`; each [n_sites], differentiable.

    ValueError if the set was fitted to other models, unless `check_models` is False.
    """
    pair = ModelPair(as_residual(dense), as_residual(sparse), bridge_set)
    if check_models:
        bridge_set.check_models(pair.dense.model, pair.sparse.model)
    check_tokens("input_ids", input_ids, attention_mask, pair.dense, pair.sparse)
    if sites is not None and not len(sites):
        raise ValueError(f"sites={sites!r} names none; leave it out for all")
    with frozen(pair.dense.model):  # the dense model is a fixed target: no dropout, no gradient
        return _losses(pair, input_ids, attention_mask, sites)


def _losses(
    pair: ModelPair, input_ids: Tensor, attention_mask: Tensor | None, sites: Sequence[str] | None
) -> HybridLosses:
    bridge_set = pair.bridge_set
    traces = trace_pair(pair, input_ids, attention_mask)
    scale = combine_moments([batch_moments(pair, traces)])
    rows = []
    for i in range(len(bridge_set)) if sites is None else [bridge_set.index(site) for site in sites]:
        sums = [*squared_errors(pair, traces, i), *(kl_sum(pair, traces, i, start) for start in ("dense", "sparse"))]
        divisors = (scale.variance_sparse[i], scale.variance_dense[i], scale.tokens, scale.tokens)
        rows.append([total / divisor.to(total) for total, divisor in zip(sums, divisors, strict=True)])
    device = rows[0][0].device
    return HybridLosses(*(torch.stack([term.to(device) for term in column]) for column in zip(*rows, strict=True)))
