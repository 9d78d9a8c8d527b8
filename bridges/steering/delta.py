"""The formula of an edit: a change of sparse reads as a change of the dense model (paper A.4; method.md, section 4).

Read: the sublayer's input, after the norm. R: the mean RMS of the stream, centred where the norm is a LayerNorm.

`steer` uses `stream_to_read` and `Bridge.read_columns`, `counterfactual` uses `changed_reads`; `bridges.channels`
computes with the other functions, on `ResidualModel`s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.models.residual import Norm, ResidualModel, Trace
from bridges.objective.hybrid import ModelPair

EntryPoint = Literal["read", "residual"]


def changed_reads(
    sparse: ResidualModel,
    input_ids: Int[Tensor, "b s"],
    counterfactual_ids: Int[Tensor, "b t"],
    attention_mask: Int[Tensor, "b s"] | None = None,
) -> list[Float[Tensor, "b s d_sparse"]]:
    """dn = n_counterfactual - n_presented at every site of the sparse model, in read units; zero on padding.

    Raises ValueError if the prompts differ in shape.
    """
    if input_ids.shape != counterfactual_ids.shape:
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} and counterfactual_ids {tuple(counterfactual_ids.shape)} must have "
            "one shape; use pairs of prompts of equal token length"
        )
    presented, counterfactual = (sparse.reads(ids, attention_mask) for ids in (input_ids, counterfactual_ids))
    real = 1 if attention_mask is None else attention_mask[..., None].to(presented[0].device)
    return [(after - before) * real for before, after in zip(presented, counterfactual, strict=True)]


def sparse_delta(pair: ModelPair, site: int, dn: Float[Tensor, "*b d_sparse"]) -> Float[Tensor, "*b d_sparse"]:
    """dz = dn R_s / gain_s: the change of the sparse stream that changes its read by dn, at strength 1.

    It is 0 in channels whose gain is 0: their read is always 0, whatever the stream.
    """
    bridge = pair.bridge_set[site]
    gain = bridge.gain_sparse.to(dn)
    dz = dn * bridge.rms_sparse.to(dn) / gain
    return torch.where(gain == 0, 0, dz)


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


def edited_logits(
    model: ResidualModel, trace: Trace, site: int, addend: Float[Tensor, "b s d"], at: EntryPoint
) -> Float[Tensor, "b s vocab"]:
    """Logits with `addend` added to the read of a site (for its sublayer alone) or to the stream (for all later ones).

    `trace` is the unedited run: only what comes after the site runs again.
    """
    residual = trace.residuals[site]
    if at == "residual":
        return model.tail(site, residual + addend.to(residual), trace.context)
    with model.hook_reads({site: lambda read: read + addend.to(read)}):
        return model.tail(site, residual, trace.context)
