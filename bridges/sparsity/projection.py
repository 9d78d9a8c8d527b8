"""Weight-sparse training: the projection after each step, schedules of density and learning rate (method section 5)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bridges.ops.abs_topk import abs_topk_mask, apply_mask

_UNPRUNED_PARAMETERS = ("sink_logit", "final_logits_bias", "bigram_table")
CHANNEL_DIM = {"attn.c_attn.weight": 0, "mlp.c_fc.weight": 0, "attn.c_proj.weight": 1, "mlp.c_proj.weight": 1}
"""The dimension of a weight that indexes its neurons or its q, k, v channels, by the end of the weight's name."""


def sparse_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and tensors of the parameters that are sparse: matrices, embeddings and biases, a tied tensor once.

    Norms (`ln_*`), sinks, `final_logits_bias` and `bigram_table` are not pruned, nor is a `wpe` that does not train.
    """
    for name, parameter in model.named_parameters():
        path = name.split(".")
        fixed_positions = "wpe" in path and not parameter.requires_grad
        if (
            path[-1] not in _UNPRUNED_PARAMETERS
            and not any(part.startswith("ln_") for part in path)
            and not fixed_positions
        ):
            yield name, parameter


@torch.no_grad()
def project(model: nn.Module, kept: float, min_per_channel: int = 4) -> None:
    """Zero, in place, all but the entries of largest magnitude in each of the model's `sparse_parameters` that train.

    Each tensor keeps max(1, round(kept * numel)) entries, ties to the lowest index, but never fewer than
    `min_per_channel` in a row of `c_attn` and `c_fc` or a column of `c_proj` (neurons and attention channels): the
    largest of each channel are reserved first, then the largest of the rest fill the remaining count.
    ValueError unless 0 < kept <= 1.
    """
    if not 0 < kept <= 1:
        raise ValueError(f"kept={kept} must be above 0 and at most 1: it is the fraction of entries that stay")
    for name, parameter in sparse_parameters(model):
        count = max(1, round(kept * parameter.numel()))
        if count < parameter.numel() and parameter.requires_grad:
            mask = largest(parameter, count, channel_dim(name), min_per_channel)
            parameter.copy_(apply_mask(parameter, mask))


def supports(model: nn.Module) -> dict[str, Tensor]:
    """The support of each of the model's `sparse_parameters`: boolean masks, True where not zero, by name."""
    return {name: parameter.detach() != 0 for name, parameter in sparse_parameters(model)}


def kept_fraction(step: int, steps: int, target: float, anneal: float = 0.5, start: float = 1.0) -> float:
    """The fraction of weights that `project` keeps after step `step` of `steps`, counted from 1.

    It goes linearly from `start` to `target` over the first anneal * steps steps, then stays.
    """
    return target if step >= anneal * steps else start + (target - start) * step / (anneal * steps)


def geometric_fraction(step: int, steps: int, target: float, anneal: float, start: float) -> float:
    """As `kept_fraction`, but falling by the same factor in every step: most of the time passes at low densities."""
    return target if step >= anneal * steps else start * (target / start) ** (step / (anneal * steps))


def density(model: nn.Module) -> float:
    """The fraction of the entries of the model's `sparse_parameters` that are not zero."""
    parameters = [parameter for _, parameter in sparse_parameters(model)]
    return sum(int(p.count_nonzero()) for p in parameters) / sum(p.numel() for p in parameters)


def learning_rate(
    step: int, steps: int, lr: float, warmup: float = 0.01, kept: float = 1.0, target: float = 1.0
) -> float:
    """The learning rate of step `step` of `steps`, counted from 1: warm-up, then linear decay to just above 0.

    With w = max(1, ceil(warmup * steps)), it is lr * sqrt(target / kept) times step / w up to step w, and times
    (steps + 1 - step) / (steps + 1 - w) from there. `kept` is the fraction of weights at this step, `target` the final
    one, so that `lr` is the peak at the final density.
    """
    warm = max(1, math.ceil(warmup * steps))
    ramp = step / warm if step <= warm else (steps + 1 - step) / (steps + 1 - warm)
    return lr * ramp * math.sqrt(target / kept)


@torch.no_grad()
def clip_to_rms(parameters: Iterable[Tensor], max_rms: float = 1.0) -> Float[Tensor, ""]:
    """Scale gradients in place so that the root mean square of all their entries is at most `max_rms`.

    Returns the root mean square before scaling, in at least float32; 0 if no parameter has a gradient. Gradients that
    are not finite stay so.
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


def channel_dim(name: str) -> int | None:
    """The dimension that indexes neurons or attention channels in the tensor of this name; None: it has none."""
    return next((dim for suffix, dim in CHANNEL_DIM.items() if name.endswith(suffix)), None)


def largest(
    weight: Float[Tensor, "*shape"], count: int, dim: int | None, min_per_channel: int
) -> Bool[Tensor, "*shape"]:
    """The mask of the `count` entries of largest magnitude, with at least `min_per_channel` in every channel."""
    weight = weight.detach()
    if dim is not None and min_per_channel > 0:
        n_reserved = min(min_per_channel, weight.shape[1 - dim])
        reserved = abs_topk_mask(weight.movedim(dim, 0).contiguous(), n_reserved).movedim(0, dim)
        # Reserved entries rank before all others. No branch on values, which would wait for a GPU.
        weight = torch.where(reserved, torch.inf, weight)
        count = max(count, n_reserved * weight.shape[dim])
    return abs_topk_mask(weight.flatten(), count).view(weight.shape)
