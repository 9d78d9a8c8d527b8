"""Exact KL divergence between rows of logits, computed chunk by chunk together with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 128
"""Rows converted to float32 at a time: their probabilities fit in the processor's cache and take little memory."""


def kl_divergence(target_logits: Float[Tensor, "n v"], logits: Float[Tensor, "n v"]) -> Float[Tensor, ""]:
    """Sum over rows of KL(softmax(target_logits) || softmax(logits)) in nats, exact over the whole vocabulary.

    Computed and returned in the widest of both dtypes and float32 (method.md section 2). A token to which the target
    gives probability 0 (a logit of -inf) adds 0; one to which `logits` alone gives 0 makes the divergence infinite. No
    gradient reaches the target, and the gradient cannot be differentiated again.
    """
    wants_grad = torch.is_grad_enabled() and logits.requires_grad
    return _KLDivergence.apply(target_logits.detach(), logits, wants_grad)  # pyright: ignore[reportReturnType]


def kl_divergence_eager(target_logits: Float[Tensor, "n v"], logits: Float[Tensor, "n v"]) -> Float[Tensor, ""]:
    """`kl_divergence` on all rows at once, by log-softmax and autograd: the reference implementation, used in tests."""
    log_p, log_q = (z.log_softmax(-1) for z in _promote(target_logits.detach(), logits))
    return _summands(log_p.exp(), log_p, log_q).sum()


def _promote(*tensors: Tensor) -> list[Tensor]:
    """The tensors converted to the widest of their dtypes and float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _kl_and_gradient(
    target_logits: Float[Tensor, "n v"], logits: Float[Tensor, "n v"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "n v"]]:
    """The divergence summed over rows and its gradient with respect to `logits`, softmax(logits) - softmax(target).

    Both have the dtype of `_promote(target_logits, logits)`.
    """
    target, predicted = _promote(target_logits, logits)
    p, q = target.softmax(-1), predicted.softmax(-1)
    total = _summands(p, target.log_softmax(-1), predicted.log_softmax(-1)).sum()
    return total, q.sub_(p)


def _summands(
    p: Float[Tensor, "n v"], log_p: Float[Tensor, "n v"], log_q: Float[Tensor, "n v"]
) -> Float[Tensor, "n v"]:
    """The terms p (log p - log q), 0 where p is 0, also if both logarithms are -inf."""
    return torch.where(p != 0, p * (log_p - log_q), 0)  # not p > 0, which would hide a NaN


class _KLDivergence(torch.autograd.Function):
    """Computes the gradient in the forward pass, from each chunk's probabilities, and saves nothing else."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, logits: Tensor, wants_grad: bool) -> Tensor:
        gradient = torch.empty_like(logits) if wants_grad else None
        totals = _promote(target.new_zeros(()), logits.new_zeros(()))[:1]
        for start in range(0, len(logits), _CHUNK):
            rows = slice(start, start + _CHUNK)
            total, chunk_grad = _kl_and_gradient(target[rows], logits[rows])
            totals.append(total)
            if gradient is not None:
                gradient[rows] = chunk_grad
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.stack(totals).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * grads[0], None
