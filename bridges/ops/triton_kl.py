"""The Triton twin of a KL and its gradient, row by row; import this module only where `has_triton_kernel` says so."""

from __future__ import annotations

import math
from inspect import unwrap

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

_BLOCK = 4096
"""Logits that a program looks at together."""
_WARPS = 8


def _add_exponentials(logits, largest, total):
    """The running largest logit, and the running sum of exponentials relative to it, with some logits more."""
    new = tl.maximum(largest, tl.max(logits, 0))
    base = tl.where(new == -float("inf"), 0.0, new)  # -inf minus itself would be NaN
    return new, total * tl.exp(largest - base) + tl.sum(tl.exp(logits - base), 0)


# The test run wraps every function in a check of its types, which Triton could not compile.
_add_exponentials_kernel = triton.jit(unwrap(_add_exponentials))


def _kl_row(
    target, logits, kl, normalizer, gradient, width, target_step, logits_step, gradient_step,
    with_gradient: tl.constexpr, dtype: tl.constexpr, blocks: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One row in two passes: both normalizers, then the divergence and the difference of the probabilities."""
    row = tl.program_id(0).to(tl.int64)
    target += row * target_step
    logits += row * logits_step
    p_largest = tl.full([], -float("inf"), dtype)
    q_largest = tl.full([], -float("inf"), dtype)
    p_total = tl.full([], 0.0, dtype)
    q_total = tl.full([], 0.0, dtype)
    for i in range(blocks):
        columns = i * block + tl.arange(0, block)
        t = tl.load(target + columns, mask=columns < width, other=-float("inf")).to(dtype)
        z = tl.load(logits + columns, mask=columns < width, other=-float("inf")).to(dtype)
        p_largest, p_total = _add_exponentials_kernel(t, p_largest, p_total)  # pyright: ignore
        q_largest, q_total = _add_exponentials_kernel(z, q_largest, q_total)  # pyright: ignore
    p_normalizer = p_largest + tl.log(p_total)
    q_normalizer = q_largest + tl.log(q_total)
    total = tl.full([], 0.0, dtype)
    for i in range(blocks):
        columns = i * block + tl.arange(0, block)
        inside = columns < width
        log_p = tl.load(target + columns, mask=inside, other=-float("inf")).to(dtype) - p_normalizer
        log_q = tl.load(logits + columns, mask=inside, other=-float("inf")).to(dtype) - q_normalizer
        p = tl.exp(log_p)
        # 0 where p is 0, also if both logarithms are -inf; not p > 0, which would hide a NaN.
        total += tl.sum(tl.where(inside & (p != 0), p * (log_p - log_q), 0.0), 0)
        if with_gradient:
            difference = (tl.exp(log_q) - p).to(gradient.dtype.element_ty)
            tl.store(gradient + row * gradient_step + columns, difference, mask=inside)
    tl.store(kl + row, total)
    tl.store(normalizer + row, q_normalizer)


_kl_row_kernel = triton.jit(unwrap(_kl_row))


def kl_and_gradient(
    target_logits: Float[Tensor, "n v"], logits: Float[Tensor, "n v"], gradient: Float[Tensor, "n v"] | None = None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """KL(softmax(target_logits) || softmax(logits)) of every row, in nats, and logsumexp(logits).

    `gradient` is set to softmax(logits) - softmax(target_logits), the derivative by the logits; it may be `logits`
    itself, which are then overwritten. Computed in the widest of both dtypes and float32, with nothing but the results
    in memory: each row is read twice.
    """
    n, width = logits.shape
    assert target_logits.shape == logits.shape, "a narrower target would be read past its end"
    wide = torch.float64 if torch.float64 in (target_logits.dtype, logits.dtype) else torch.float32
    kl, normalizer = (torch.empty(n, dtype=wide, device=logits.device) for _ in range(2))
    target_logits, logits = (z if z.stride(1) == 1 else z.contiguous() for z in (target_logits, logits))
    out = logits if gradient is None else gradient
    assert out.stride(1) == 1
    if n:
        with torch.cuda.device_of(logits):
            _kl_row_kernel[(n,)](
                *(target_logits, logits, kl, normalizer, out, width),
                *(target_logits.stride(0), logits.stride(0), out.stride(0), gradient is not None),
                *(tl.float64 if wide == torch.float64 else tl.float32, math.ceil(width / _BLOCK), _BLOCK),
                num_warps=_WARPS,
            )
    return kl, normalizer
