"""Weight-sparse training: the projection after each step, its schedule and the learning rate's (method, section 5)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bridges.ops.abs_topk import abs_topk_mask, keep

_DENSE = ("sink_logit", "final_logits_bias", "bigram_table")
_CHANNELS = {"attn.c_attn.weight": 0, "mlp.c_fc.weight": 0, "attn.c_proj.weight": 1, "mlp.c_proj.weight": 1}
"""The dimension of a weight along which its neurons or q, k, v channels lie."""


def sparse_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and tensors of the weights that are sparse: matrices, embeddings and biases, a tied tensor once.

    Norms (`ln_*`), sinks, `final_logits_bias` and `bigram_table` are dense, and so is a `wpe` that is not trained.
    """
    for name, parameter in model.named_parameters():
        path = name.split(".")
        fixed_positions = "wpe" in path and not parameter.requires_grad
        if path[-1] not in _DENSE and not any(part.startswith("ln_") for part in path) and not fixed_positions:
            yield name, parameter


@torch.no_grad()
def project(model: nn.Module, kept: float, min_per_channel: int = 4) -> None:
    """Zero, in place, all but the entries of largest magnitude in each of the model's `sparse_parameters` that train.

    Each tensor keeps max(1, round(kept * numel)) entries, ties to the lowest index, but never fewer than
    `min_per_channel` in a row of `c_attn` and `c_fc` or a column of `c_proj` (neurons and attention channels): the
    largest of each channel are set aside first, then the largest of the rest fill what the budget leaves.
    ValueError unless 0 < kept <= 1.
    """
    if not 0 < kept <= 1:
        raise ValueError(f"kept must be over 0 and at most 1, got {kept}")
    for name, parameter in sparse_parameters(model):
        count = max(1, round(kept * parameter.numel()))
        if count < parameter.numel() and parameter.requires_grad:
            parameter.copy_(keep(parameter, _largest(parameter, count, _channels(name), min_per_channel)))


def supports(model: nn.Module) -> dict[str, Tensor]:
    """Where each of the model's `sparse_parameters` is not zero: boolean masks of their shapes, by name."""
    return {name: parameter.detach() != 0 for name, parameter in sparse_parameters(model)}


def nonzeros(model: nn.Module) -> int:
    """How many entries of the model's `sparse_parameters` are not zero."""
    return sum(int(torch.count_nonzero(parameter)) for _, parameter in sparse_parameters(model))


def density(model: nn.Module) -> float:
    """The fraction of entries of the model's `sparse_parameters` that are not zero."""
    return nonzeros(model) / sum(parameter.numel() for _, parameter in sparse_parameters(model))


def kept_fraction(step: int, steps: int, target: float, anneal: float = 0.5, start: float = 1.0) -> float:
    """The fraction of weights kept after step `step` of `steps`, counted from 1.

    start + (target - start) * step / (anneal * steps), then `target` from step anneal * steps on.
    """
    return target if step >= anneal * steps else start + (target - start) * step / (anneal * steps)


def learning_rate(
    step: int, steps: int, lr: float, warmup: float = 0.01, kept: float = 1.0, target: float = 1.0
) -> float:
    """The learning rate of step `step` of `steps`, counted from 1; `lr` is its peak at the final density.

    With w = max(1, ceil(warmup * steps)): lr * sqrt(target / kept) times step / w up to step w, then
    (steps + 1 - step) / (steps + 1 - w), which has its last value above 0 at the last step.
    """
    warm = max(1, math.ceil(warmup * steps))
    ramp = step / warm if step <= warm else (steps + 1 - step) / (steps + 1 - warm)
    return lr * ramp * math.sqrt(target / kept)


@torch.no_grad()
def clip_to_rms(parameters: Iterable[Tensor], max_rms: float = 1.0) -> Float[Tensor, ""]:
    """Scale gradients in place so that the root mean square of all their entries is at most `max_rms`.

    Returns the value before, in at least float32; 0 where no parameter has a gradient. What is not finite stays so.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    rms = total / math.sqrt(sum(gradient.numel() for gradient in gradients))
    scale = (max_rms / rms).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.device))
    return rms


def _channels(name: str) -> int | None:
    return next((dim for suffix, dim in _CHANNELS.items() if name.endswith(suffix)), None)


def _largest(
    weight: Float[Tensor, "*shape"], count: int, channels: int | None, min_per_channel: int
) -> Bool[Tensor, "*shape"]:
    """The mask of the `count` entries of largest magnitude, with a floor in every channel."""
    mask = abs_topk_mask(weight.detach().flatten(), count).view(weight.shape)
    if channels is None or min_per_channel < 1:
        return mask
    floor = min(min_per_channel, weight.shape[1 - channels])
    if mask.sum(1 - channels).amin() >= floor:
        return mask  # it holds each channel's largest already, so setting them aside changes nothing
    reserve = abs_topk_mask(weight.detach().movedim(channels, 0), floor).movedim(0, channels).contiguous()
    room = count - floor * weight.shape[channels]
    if room > 0:
        # Those of the first mask that are not reserved: no other entry can be among the largest of the rest.
        rest = (mask & ~reserve).flatten().nonzero().squeeze(1)
        reserve.view(-1)[rest[abs_topk_mask(weight.detach().flatten()[rest], room)]] = True
    return reserve
