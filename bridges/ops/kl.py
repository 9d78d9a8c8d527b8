"""Exact KL divergence between rows of logits, computed chunk by chunk together with its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridges.ops.compiled import has_triton_kernel

_CHUNK = 128
"""Rows converted to float32 at a time: their probabilities take little memory."""
_GPU_CHUNK_ENTRIES = 2**24
"""Logits converted at a time on a GPU, 64 MiB of float32: enough rows to keep it busy."""


def kl_divergence(
    target_logits: Float[Tensor, "n v"], logits: Float[Tensor, "n v"], counted: Bool[Tensor, " n"] | None = None
) -> Float[Tensor, ""]:
    """Sum over rows of KL(softmax(target_logits) || softmax(logits)) in nats, exact over the whole vocabulary.

    `counted`: the rows that the sum is over, by default all. The others add nothing to it and get a gradient of zero,
    whatever they hold; to take them out first would make the host wait for a GPU.

    Computed and returned in the widest of both dtypes and float32 (method.md section 2). A token to which the target
    gives probability 0 (a logit of -inf) adds 0; one to which `logits` alone gives 0 makes the divergence infinite. No
    gradient reaches the target, and the gradient cannot be differentiated again.
    """
    wants_grad = torch.is_grad_enabled() and logits.requires_grad
    return _KLDivergence.apply(target_logits.detach(), logits, counted, wants_grad)  # pyright: ignore[reportReturnType]


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


class RowDivergence(NamedTuple):
    """What `row_divergence` gives, per row and in nats; in the widest of the logits' dtypes and float32."""

    kl: Float[Tensor, " n"]
    """KL(softmax(target_logits) || softmax(logits))."""
    log_normalizer: Float[Tensor, " n"]
    """logsumexp(logits): minus a label's logit it is the cross-entropy."""


@torch.no_grad()
def row_divergence(target_logits: Float[Tensor, "n v"], logits: Float[Tensor, "n v"]) -> RowDivergence:
    """The summands of `kl_divergence`, without a gradient, with what a cross-entropy of the same logits needs."""
    parts = [_chunk_divergence(target_logits[rows], logits[rows]) for rows in _chunks(logits)]
    if not parts:
        empty = _promote(target_logits, logits)[0].new_zeros(0)
        return RowDivergence(empty, empty)
    return RowDivergence(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _chunks(logits: Float[Tensor, "n v"]) -> Iterator[slice]:
    size = max(_CHUNK, _GPU_CHUNK_ENTRIES // max(1, logits.shape[-1])) if logits.is_cuda else _CHUNK
    return (slice(start, start + size) for start in range(0, len(logits), size))


def _chunk_divergence(target_logits: Float[Tensor, "n v"], logits: Float[Tensor, "n v"]) -> RowDivergence:
    """The figures of a few rows; no softmax of `logits` is computed."""
    if has_triton_kernel(logits):
        from bridges.ops.triton_kl import kl_and_gradient

        return RowDivergence(*kl_and_gradient(target_logits, logits))
    target, predicted = _promote(target_logits, logits)
    log_normalizer = predicted.logsumexp(-1)
    log_p, log_q = target.log_softmax(-1), predicted - log_normalizer[:, None]
    return RowDivergence(_summands(log_p.exp(), log_p, log_q).sum(-1), log_normalizer)


def _kl_and_gradient(
    target_logits: Float[Tensor, "n v"],
    logits: Float[Tensor, "n v"],
    gradient: Float[Tensor, "n v"],
    counted: Bool[Tensor, " n"] | None,
) -> Float[Tensor, ""]:
    """The divergence summed over rows; `gradient` is set to softmax(logits) - softmax(target), its derivative.

    The sum has the dtype of `_promote(target_logits, logits)`.
    """
    total = _fill_gradient(target_logits, logits, gradient, counted)
    if counted is not None:
        gradient.masked_fill_(~counted[:, None], 0)
    return total


def _fill_gradient(
    target_logits: Float[Tensor, "n v"],
    logits: Float[Tensor, "n v"],
    gradient: Float[Tensor, "n v"],
    counted: Bool[Tensor, " n"] | None,
) -> Float[Tensor, ""]:
    """`_kl_and_gradient`, but for the gradient of the rows that are not counted."""
    if has_triton_kernel(logits):
        from bridges.ops.triton_kl import kl_and_gradient

        return _sum_of_counted(kl_and_gradient(target_logits, logits, gradient)[0], counted)
    target, predicted = _promote(target_logits, logits)
    log_p, log_q = target.log_softmax(-1), predicted.log_softmax(-1)
    p = log_p.exp()
    # Without a `where` on every entry, where the host can look at the sum at no cost.
    total = _sum_of_counted((p * (log_p - log_q)).sum(-1), counted) if _read_at_no_cost(p) else None
    if total is None or total.isnan():
        total = _sum_of_counted(_summands(p, log_p, log_q).sum(-1), counted)
    if gradient.dtype == log_q.dtype:
        torch.exp(log_q, out=gradient).sub_(p)
    else:
        gradient.copy_(log_q.exp_().sub_(p))
    return total


def _read_at_no_cost(tensor: Tensor) -> bool:
    """Whether the host has a tensor's values already; for those of a GPU it would wait."""
    return tensor.device.type == "cpu"


def _sum_of_counted(kl: Float[Tensor, " n"], counted: Bool[Tensor, " n"] | None) -> Float[Tensor, ""]:
    """The sum of the rows that count, whatever the others hold."""
    return kl.sum() if counted is None else torch.where(counted, kl, 0).sum()


def _summands(
    p: Float[Tensor, "n v"], log_p: Float[Tensor, "n v"], log_q: Float[Tensor, "n v"]
) -> Float[Tensor, "n v"]:
    """The terms p (log p - log q), 0 where p is 0, also if both logarithms are -inf."""
    return torch.where(p != 0, p * (log_p - log_q), 0)  # not p > 0, which would hide a NaN


class _KLDivergence(torch.autograd.Function):
    """Computes the gradient in the forward pass, from each chunk's probabilities, and saves nothing else."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, logits: Tensor, counted: Tensor | None, wants_grad: bool) -> Tensor:
        # Rows in order also where those of the logits are not: a kernel writes one after the other.
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if wants_grad else None
        totals = _promote(target.new_zeros(()), logits.new_zeros(()))[:1]
        for rows in _chunks(logits):
            of_rows = None if counted is None else counted[rows]
            if gradient is None:
                totals.append(_sum_of_counted(_chunk_divergence(target[rows], logits[rows]).kl, of_rows))
            else:
                totals.append(_kl_and_gradient(target[rows], logits[rows], gradient[rows], of_rows))
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.stack(totals).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * grads[0], None, None
