"""Two bridged models on one batch: their streams, and what the losses at a site are divided by."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.models.residual import ResidualModel, Trace
from bridges.objective.normalizers import BatchMoments, counted_tokens, stream_moments

Side = Literal["dense", "sparse"]
SIDES: tuple[Side, Side] = ("dense", "sparse")


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

    def cross(self, bridge: int, stream: Float[Tensor, "b s _"], start: Side, end: Side) -> Float[Tensor, "b s _"]:
        """A stream of one side as the other side's, on that model's device and in its dtype; itself if both are one."""
        if start == end:
            return stream
        maps, model = self.bridge_set[bridge], self.model(end)
        stream = stream.to(maps.encoder_weight.device)
        return (maps.encode(stream) if end == "sparse" else maps.decode(stream)).to(model.device, model.dtype)


class Traces(NamedTuple):
    """The forward passes of both models on one batch, each by itself."""

    dense: Trace
    sparse: Trace

    def side(self, side: Side) -> Trace:
        """The trace of one side."""
        return self.dense if side == "dense" else self.sparse


def trace_pair(
    pair: ModelPair,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    logits: Collection[Side] = SIDES,
) -> Traces:
    """Run both models on one batch, each on its own device.

    A model that is not among `logits` runs up to its last bridged site, and its logits have width 0. Logits that one
    model alone has are cut off: its vocabulary may be padded to a round number.
    """
    last = len(pair.bridge_set) - 1
    width = min(pair.dense.logits_width, pair.sparse.logits_width)

    def on(side: Side) -> Trace:
        model = pair.model(side)
        mask = attention_mask if attention_mask is None else _queued_copy(attention_mask, model.device)
        ids = _queued_copy(input_ids, model.device)
        trace = model.trace(ids, mask, with_logits=side in logits, last_site=pair.site(side, last))
        return trace._replace(logits=trace.logits[..., :width])

    return Traces(*(on(side) for side in SIDES))


def _queued_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; the host does not wait until a GPU has it."""
    return tensor.to(device, non_blocking=device.type == "cuda")  # a CPU could read it before it is there


def residuals_at(pair: ModelPair, traces: Traces, bridge: int) -> tuple[Tensor, Tensor]:
    """The dense and the sparse stream [batch, seq, d_model] at one bridged site, on the bridge's device."""
    device = pair.bridge_set[bridge].encoder_weight.device
    dense, sparse = (traces.side(side).residuals[pair.site(side, bridge)].to(device) for side in SIDES)
    return dense, sparse


def counted_at(pair: ModelPair, traces: Traces, bridge: int) -> Bool[Tensor, "b s"]:
    """True at the tokens that NMSE, moments and RMS count at one bridged site: those of `counted_tokens` that are
    massive in neither stream.
    """
    usual = pair.bridge_set[bridge].is_usual(*residuals_at(pair, traces, bridge))
    return usual & counted_tokens(traces.dense.context.input_ids, traces.dense.context.attention_mask).to(usual.device)


def batch_moments(pair: ModelPair, traces: Traces) -> BatchMoments:
    """One batch's part of what the losses are divided by."""
    streams = [residuals_at(pair, traces, i) for i in range(len(pair.bridge_set))]
    counted = [counted_at(pair, traces, i) for i in range(len(pair.bridge_set))]
    return stream_moments(streams, traces.dense.context.input_ids, traces.dense.context.attention_mask, counted)


def empty_moments(pair: ModelPair) -> BatchMoments:
    """The moments of a process that has no batch."""
    device = pair.bridge_set[0].encoder_weight.device
    return BatchMoments.empty(len(pair.bridge_set), pair.dense.d_model, pair.sparse.d_model, device)
