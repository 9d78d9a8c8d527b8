"""Unembedding and KL divergence in one: logits exist for a chunk of rows at a time, in the forward alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridges.ops.kl import kl_and_gradient, kl_divergence_eager, raised


def linear_kl(
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    target_logits: Float[Tensor, "n v"],
    chunk: int = 128,
) -> Float[Tensor, ""]:
    """Sum over rows of KL(softmax(target_logits) || softmax(x W' + b)) in nats, exact over the whole vocabulary.

    The gradients of `x`, `weight` and `bias`, of those that want one, are computed in the forward, `chunk` rows at a
    time. Logits have the dtype that `F.linear` gives; the rest is as in `kl_divergence`: at least float32, no gradient
    to the target, none of second order. ValueError if `chunk` is under 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    recorded = torch.is_grad_enabled()
    wanted = _Each(*(recorded and tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)))
    return _LinearKL.apply(x, weight, bias, target_logits.detach(), chunk, wanted)  # pyright: ignore[reportReturnType]


def linear_kl_eager(
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    target_logits: Float[Tensor, "n v"],
) -> Float[Tensor, ""]:
    """`linear_kl` with all logits at once and by autograd: its twin, the oracle of its tests."""
    return kl_divergence_eager(target_logits, F.linear(x, weight, bias))


class _Each(NamedTuple):
    """Something for each tensor that can have a gradient."""

    x: Any
    weight: Any
    bias: Any


class _LinearKL(torch.autograd.Function):
    """Keeps the three gradients, whose sizes are those of the inputs, and no logits."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, chunk: int, wanted: _Each
    ) -> Tensor:
        gradients = _Each(
            torch.empty_like(x) if wanted.x else None,
            _accumulator(weight) if wanted.weight else None,
            _accumulator(bias) if wanted.bias else None,
        )
        totals = raised(target.new_zeros(()), x.new_zeros(()))[:1]
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(x[rows], weight, bias)
            total, gradient = kl_and_gradient(target[rows], logits)
            totals.append(total)
            _add(gradients, gradient.to(logits.dtype), x[rows], weight, rows)
        dtypes = (tensor if tensor is None else tensor.dtype for tensor in (x, weight, bias))
        saved = (g if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True))
        ctx.save_for_backward(*saved)
        return torch.stack(totals).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if gradient is None else gradient * grads[0] for gradient in ctx.saved_tensors)
        return *scaled, None, None, None


def _accumulator(parameter: Tensor | None) -> Tensor:
    """Zeros to sum over chunks in: in float16 the small ones would get lost."""
    assert parameter is not None
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


def _add(gradients: _Each, gradient: Tensor, x: Tensor, weight: Tensor, rows: slice) -> None:
    """A chunk's part in each gradient that is wanted, from that of its logits."""
    if gradients.x is not None:
        gradients.x[rows] = gradient @ weight
    if gradients.weight is not None:
        gradients.weight.add_(gradient.mT @ x)
    if gradients.bias is not None:
        gradients.bias.add_(gradient.sum(0))
