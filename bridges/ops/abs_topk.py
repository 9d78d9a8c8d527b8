"""AbsTopK: keep the k entries of largest magnitude in every row, exactly k, ties to the lowest index.

Magnitudes are compared as integers, the bits of the float without its sign. They have the order of the numbers, with no
rounding and no flushing of subnormals, in every float dtype. NaN counts as the largest magnitude, so that it is kept
and shows in the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.ops.compiled import has_kernel, has_triton_kernel

MAX_COUNTED_CHANNELS = 8
"""Up to this many channels, `abs_topk_at` counts what ranks before each; for more, finding every row's threshold is
cheaper (benchmarks/bench_abs_topk.py)."""

LONG_ROW = 2**16
"""Rows from this length on, such as the flattened matrices of weight-sparse training, are searched by brackets."""


class _FloatBits(NamedTuple):
    """How the bits of a float dtype are read as an integer."""

    dtype: torch.dtype
    """The integer dtype of the same width."""
    infinity: int
    """The bits of infinity."""


_BITS = {
    torch.float16: _FloatBits(torch.int16, 0x7C00),
    torch.bfloat16: _FloatBits(torch.int16, 0x7F80),
    torch.float32: _FloatBits(torch.int32, 0x7F80_0000),
    torch.float64: _FloatBits(torch.int64, 0x7FF0_0000_0000_0000),
}


def abs_topk(x: Float[Tensor, "*batch d"], k: int) -> Float[Tensor, "*batch d"]:
    """Keep exactly `k` entries of largest magnitude in every row and zero the rest (AbsTopK, method.md section 1).

    Rows are the last dimension of `x`, which may have any float dtype and be on any device. Of entries of equal
    magnitude, those of lower index are kept; NaN counts as the largest magnitude. The gradient reaches kept entries
    alone, those that are 0 too. With `k >= d`, the result is `x` itself.

    Half precision rounds many magnitudes to the same number, so that ties at the threshold are common and favour low
    indices. Where that matters, pass what was computed before rounding, as `Bridge.encode` does.

    Raises ValueError if `k` is not an integer of at least 1 or `x` has no float dtype.

    >>> abs_topk(torch.tensor([[1.0, -3.0, 2.0, -2.0], [0.5, 0.5, 0.5, 0.5]]), 2)
    tensor([[ 0.0000, -3.0000,  2.0000,  0.0000],
            [ 0.5000,  0.5000,  0.0000,  0.0000]])
    """
    _check(x, k)
    if k >= x.shape[-1]:
        return x
    found = _FusedTopK.apply(x, k) if has_triton_kernel(x) else _ApplyMask.apply(x, abs_topk_mask(x, k))
    return found  # pyright: ignore[reportReturnType]


def abs_topk_eager(x: Float[Tensor, "*batch d"], k: int) -> Float[Tensor, "*batch d"]:
    """`abs_topk` in torch operations alone: the reference implementation, used in tests."""
    _check(x, k)
    return x if k >= x.shape[-1] else torch.where(abs_topk_mask_eager(x, k), x, 0)


@torch.no_grad()
def abs_topk_at(x: Float[Tensor, "*batch d"], k: int, channels: Sequence[int]) -> Float[Tensor, "*batch n"]:
    """`abs_topk(x, k)[..., channels]`, bit for bit and without a gradient, at less cost for a few channels.

    An entry is kept if fewer than k of its row rank before it, which one pass over the row counts; the row's threshold
    is not needed. ValueError if a channel is not between 0 and d - 1, or for what `abs_topk` refuses.
    """
    _check(x, k)
    if outside := [channel for channel in channels if not 0 <= channel < x.shape[-1]]:
        raise ValueError(f"channels={outside} must lie between 0 and {x.shape[-1] - 1}, the last channel of x")
    if len(channels) > MAX_COUNTED_CHANNELS:
        return abs_topk(x, k)[..., list(channels)]
    if not has_kernel(x):
        return torch.where(_kept_at_eager(x, k, channels), x[..., list(channels)], 0)
    from bridges.ops import kernels

    out = torch.empty(*x.shape[:-1], len(channels), dtype=x.dtype)
    rows, infinity = _rows_of_bits(x), _BITS[x.dtype].infinity
    kernels.topk_at(rows, k, infinity, np.array(channels, np.int64), _rows_of_bits(out))
    return out


def _kept_at_eager(x: Float[Tensor, "*batch d"], k: int, channels: Sequence[int]) -> Bool[Tensor, "*batch n"]:
    keys = _magnitude_keys(x)
    kept = torch.empty(*x.shape[:-1], len(channels), dtype=torch.bool, device=x.device)
    for i, channel in enumerate(channels):
        own = keys[..., channel, None]
        kept[..., i] = (keys > own).sum(-1) + (keys[..., :channel] == own).sum(-1) < k
    return kept


def abs_topk_mask(x: Float[Tensor, "*batch d"], k: int) -> Bool[Tensor, "*batch d"]:
    """True at the `k` entries of largest magnitude in every row, ties to the lowest index; everywhere if `k >= d`."""
    _check(x, k)
    if k < x.shape[-1] and has_triton_kernel(x):
        from bridges.ops import triton_kernels

        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        rows = _rows_of_integers(x)
        triton_kernels.topk_mask(rows, k, _BITS[x.dtype].infinity, mask.view(rows.shape))
        return mask
    if k >= x.shape[-1] or not has_kernel(x):
        return abs_topk_mask_eager(x, k)
    from bridges.ops import kernels

    mask = torch.empty(x.shape, dtype=torch.bool)
    rows, infinity = _rows_of_bits(x), _BITS[x.dtype].infinity
    flags = mask.view(rows.shape).numpy()
    if x.shape[-1] < LONG_ROW:
        kernels.topk_mask(rows, k, infinity, flags)
    else:
        for row, row_flags in zip(rows, flags, strict=True):
            kernels.topk_mask_long(row, k, infinity, row_flags)
    return mask


def abs_topk_mask_eager(x: Float[Tensor, "*batch d"], k: int) -> Bool[Tensor, "*batch d"]:
    """`abs_topk_mask` in torch operations alone: the reference implementation, used in tests."""
    _check(x, k)
    if k >= x.shape[-1]:
        return torch.ones_like(x, dtype=torch.bool)
    keys = _magnitude_keys(x.detach())
    threshold = keys.topk(k, sorted=False).values.amin(-1, keepdim=True)
    mask = keys >= threshold
    if x.is_cuda or torch.compiler.is_compiling():  # a branch on values would wait for the GPU, or break the graph
        return _break_ties(keys, threshold, k)
    has_ties = mask.sum(-1) > k
    if has_ties.any():
        mask[has_ties] = _break_ties(keys[has_ties], threshold[has_ties], k)
    return mask


def apply_mask(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x where the mask is true, else 0, also where x is NaN; without a gradient, and on CPUs faster than `torch.where`.

    ValueError unless x and the mask have the same shape.
    """
    if x.shape != mask.shape:  # the kernel would read past the mask's end
        raise ValueError(f"mask must have the shape of x, {tuple(x.shape)}, got {tuple(mask.shape)}")
    if has_triton_kernel(x):
        from bridges.ops import triton_kernels

        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        triton_kernels.apply_mask(_flat_integers(x), mask.contiguous().view(-1), _flat_integers(out))
        return out
    if not has_kernel(x):
        return torch.where(mask, x, 0)
    from bridges.ops import kernels

    out = torch.empty(x.shape, dtype=x.dtype)
    kernels.apply_mask(_flat_integers(x).numpy(), mask.contiguous().view(-1).numpy(), _flat_integers(out).numpy())
    return out


def _check(x: Tensor, k: int) -> None:
    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")
    if x.dtype not in _BITS:
        raise ValueError(f"x must have one of the dtypes {', '.join(map(str, _BITS))}, got {x.dtype}")


def _rows_of_bits(x: Float[Tensor, "*batch d"]) -> np.ndarray:
    """`_rows_of_integers` for numba's kernels."""
    return _rows_of_integers(x).numpy()


def _rows_of_integers(x: Float[Tensor, "*batch d"]) -> Int[Tensor, "n d"]:
    """The bits of x as rows of integers: a view where x is contiguous."""
    rows = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    return rows.view(_BITS[x.dtype].dtype)


def _flat_integers(x: Float[Tensor, "*shape"]) -> Int[Tensor, " size"]:
    """The bits of x as a vector of integers: a view where x is contiguous."""
    return x.detach().contiguous().view(-1).view(_BITS[x.dtype].dtype)


def _magnitude_keys(x: Float[Tensor, "*batch d"]) -> Int[Tensor, "*batch d"]:
    """Integers in the order of the magnitudes, every NaN one above infinity."""
    bits = _BITS[x.dtype]
    return (x.view(bits.dtype) & torch.iinfo(bits.dtype).max).clamp_max(bits.infinity + 1)


def _break_ties(keys: Int[Tensor, "*batch d"], threshold: Int[Tensor, "*batch 1"], k: int) -> Bool[Tensor, "*batch d"]:
    """All keys above the threshold and, up to k in all, the first of those that equal it."""
    above, ties = keys > threshold, keys == threshold
    remaining = k - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1) <= remaining))


class _ApplyMask(torch.autograd.Function):
    """`apply_mask` with a gradient: the same mask applied to the upstream gradient, at every order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return apply_mask(x, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return _ApplyMask.apply(grads[0], *ctx.saved_tensors), None  # pyright: ignore[reportReturnType]


class _FusedTopK(torch.autograd.Function):
    """AbsTopK on a GPU: one kernel writes the values and the mask, which the gradient is passed through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
        from bridges.ops import triton_kernels

        values, mask = (torch.empty(x.shape, dtype=dtype, device=x.device) for dtype in (x.dtype, torch.bool))
        bits = _rows_of_integers(x)
        out = mask.view(bits.shape), _rows_of_integers(values)
        triton_kernels.topk_mask(bits, k, _BITS[x.dtype].infinity, *out)
        ctx.save_for_backward(mask)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return _ApplyMask.apply(grads[0], *ctx.saved_tensors), None  # pyright: ignore[reportReturnType]
