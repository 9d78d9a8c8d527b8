"""The formula of an edit: a change of sparse reads as a change of the dense model (paper A.4; method.md, section 4).

Read: the sublayer's input, after the norm. R: the mean RMS of the stream, centred where the norm is a LayerNorm.

`steer` uses `stream_to_read` and `Bridge.read_columns`, `counterfactual` uses `changed_reads`; `bridges.channels`
computes with the other functions, on `ResidualModel`s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.models.residual import Context, Norm, ResidualModel, Trace
from bridges.objective.pair import ModelPair

EntryPoint = Literal["read", "residual"]


def changed_reads(
    sparse: ResidualModel,
    input_ids: Int[Tensor, "b s"],
    counterfactual_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b s"] | None = None,
    sites: Sequence[str | int] | None = None,
) -> list[Float[Tensor, "b s d_sparse"]]:
    """dn = n_counterfactual - n_presented at sites of the sparse model (None: all), in read units; zero on padding.

    Raises ValueError if the prompts differ in shape.
    """
    check_shapes(input_ids, counterfactual_ids)
    contexts = [sparse.context(ids, attention_mask) for ids in (input_ids, counterfactual_ids)]
    return changed_reads_in(sparse, contexts, sites)


def changed_reads_in(
    sparse: ResidualModel, contexts: Sequence[Context], sites: Sequence[str | int] | None = None
) -> list[Float[Tensor, "b s d_sparse"]]:
    """`changed_reads` at the tokens of two contexts, of the presented and of the counterfactual prompt."""
    presented, counterfactual = (sparse.reads_in(context, sites) for context in contexts)
    ids, mask = contexts[0].input_ids, contexts[0].attention_mask
    real = 1 if mask is None else mask[:, -ids.shape[1] :, None].to(sparse.device)
    return [(after - before) * real for before, after in zip(presented, counterfactual, strict=True)]


def check_shapes(input_ids: Tensor, counterfactual_ids: Tensor) -> None:
    """Raise ValueError if the prompts differ in shape."""
    if input_ids.shape != counterfactual_ids.shape:
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} and counterfactual_ids {tuple(counterfactual_ids.shape)} must have "
            "one shape; use pairs of prompts of equal token length"
        )


def sparse_delta(pair: ModelPair, site: int, dn: Float[Tensor, "*b d_sparse"]) -> Float[Tensor, "*b d_sparse"]:
    """dz = dn R_s / gain_s: the change of the sparse stream that changes its read by dn, at strength 1.

    In at least float32. It is 0 in channels whose gain is 0: their read is always 0, whatever the stream.
    """
    bridge, dn = pair.bridge_set[site], at_least_float32(dn)
    gain = bridge.gain_sparse.to(dn)
    dz = dn * bridge.rms_sparse.to(dn) / gain
    return torch.where(gain == 0, 0, dz)


def at_least_float32(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The tensor in float32 where its dtype is narrower, so that many small terms of it add up."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def dense_addend(
    pair: ModelPair, site: int, dz: Float[Tensor, "*b d_sparse"], at: EntryPoint
) -> Float[Tensor, "*b d_dense"]:
    """What a change of the sparse stream adds to the dense stream (W_dec dz) or read (gain_d C(W_dec dz) / R_d)."""
    bridge = pair.bridge_set[site]
    delta = bridge.decode_delta(dz)
    if at == "residual":
        return delta
    return stream_to_read(pair.dense.norm(pair.site("dense", site)), bridge.rms_dense, delta)


def mask_channels(dz: Float[Tensor, "*b d_sparse"], channels: Sequence[int]) -> Float[Tensor, "*b d_sparse"]:
    """The change in these channels alone; 0 in all others."""
    kept = torch.zeros_like(dz)
    kept[..., list(channels)] = dz[..., list(channels)]
    return kept


def stream_to_read(norm: Norm, rms: Tensor, delta: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """gain C(delta) / R, with R = `rms`: a change of the stream in the units of the read."""
    centred = delta - delta.mean(-1, keepdim=True) if norm.centred else delta
    return norm.gain.to(delta) * centred / rms.to(delta)


def stream_to_read_transpose(norm: Norm, rms: Tensor, gradient: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """The transpose of `stream_to_read`: from the gradient at the read to that at the change of the stream."""
    scaled = norm.gain.to(gradient) * gradient / rms.to(gradient)
    return scaled - scaled.mean(-1, keepdim=True) if norm.centred else scaled


def random_addends(addend: Float[Tensor, "b s d"], n: int, seed: int) -> Iterator[Float[Tensor, "b s d"]]:
    """`n` random directions, each with the addend's norm at every token: the control of a steering figure."""
    generator = torch.Generator().manual_seed(seed)
    norm = addend.norm(dim=-1, keepdim=True)
    for _ in range(n):
        direction = torch.randn(addend.shape[-1], generator=generator).to(addend)
        yield norm * direction / direction.norm()


class Streams(NamedTuple):
    """The stream at some sites of an unedited pass."""

    residuals: dict[int, Float[Tensor, "b s d"]]
    """By the index of the site."""
    context: Context


def run_streams(
    model: ResidualModel,
    input_ids: Int[Tensor, "b s"],
    attention_mask: Int[Tensor, "b s"] | None,
    sites: Collection[int],
) -> Streams:
    """Run a model up to the last of these sites, and keep the stream at each."""
    return streams_in(model, model.context(input_ids, attention_mask), sites)


def streams_in(model: ResidualModel, context: Context, sites: Collection[int]) -> Streams:
    """`run_streams` of the tokens of a context, which may come after a prefix."""
    residual, at, kept = context.embedding, 0, {}
    for site in sorted(sites):
        residual = kept[site] = model.run(at, site, residual, context)
        at = site
    return Streams(kept, context)


class Ending(NamedTuple):
    """An edited pass up to the head."""

    residual: Float[Tensor, "b s d"]
    """The stream at `final`."""
    read_addend: Float[Tensor, "b s d"] | None = None
    """What an edit of the read at `final` adds there."""


def edited_ending(
    model: ResidualModel, trace: Trace | Streams, site: int, addend: Float[Tensor, "b s d"], at: EntryPoint
) -> Ending:
    """The stream at `final` with `addend` added to the read of a site (for its sublayer alone) or to the stream.

    `trace` is the unedited run: only what comes after the site runs again.
    """
    residual, last = trace.residuals[site], len(model.sites) - 1
    if at == "residual":
        return Ending(model.run(site, last, residual + addend.to(residual), trace.context))
    if site == last:
        return Ending(residual, addend)
    with model.hook_reads({site: lambda read: read + addend.to(read)}):
        after = model.sublayer(site, residual, trace.context)
    return Ending(model.run(site + 1, last, after, trace.context))


def ending_logits(
    model: ResidualModel, ending: Ending, context: Context, tokens: Int[Tensor, " kept"] | None = None
) -> Float[Tensor, "b kept vocab"]:
    """The logits of a pass at these tokens, ascending indices (None: all)."""

    def logits() -> Tensor:
        if tokens is None:
            return model.head(ending.residual, context)
        return model.logits_at(ending.residual, context, tokens)

    addend = ending.read_addend
    if addend is None:
        return logits()

    def add(read: Tensor) -> Tensor:
        # Where the model leaves out tokens before its unembedding, the read holds the kept ones alone.
        kept = addend if tokens is None or read.shape[1] == addend.shape[1] else addend[:, tokens.to(addend.device)]
        return read + kept.to(read)

    with model.hook_reads({len(model.sites) - 1: add}):
        return logits()


def edited_logits(
    model: ResidualModel,
    trace: Trace | Streams,
    site: int,
    addend: Float[Tensor, "b s d"],
    at: EntryPoint,
    tokens: Int[Tensor, " kept"] | None = None,
) -> Float[Tensor, "b kept vocab"]:
    """Logits of an edited pass, `edited_ending` and the head, at these tokens (None: all)."""
    return ending_logits(model, edited_ending(model, trace, site, addend, at), trace.context, tokens)
