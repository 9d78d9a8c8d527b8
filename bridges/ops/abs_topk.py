"""AbsTopK: keep the k entries of largest magnitude in every row, exactly k, ties to the lowest index.

Magnitudes are compared as integers, the floating-point bits without the sign: they order as the numbers do, without
rounding and without flushing subnormals, in every float dtype. NaN counts as the largest magnitude, so that it is kept
and seen rather than hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.ops.compiled import compiled, has_kernel


class _Bits(NamedTuple):
    """How a float dtype reads as an integer of the same width."""

    dtype: torch.dtype
    infinity: int


_BITS = {
    torch.float16: _Bits(torch.int16, 0x7C00),
    torch.bfloat16: _Bits(torch.int16, 0x7F80),
    torch.float32: _Bits(torch.int32, 0x7F80_0000),
    torch.float64: _Bits(torch.int64, 0x7FF0_0000_0000_0000),
}


def abs_topk(x: Float[Tensor, "*batch d"], k: int) -> Float[Tensor, "*batch d"]:
    """Keep exactly `k` entries of largest magnitude in every row and zero the rest (AbsTopK, method section 1).

    Rows are the last dimension of `x`, any float dtype, any device. Ties go to the lowest index; NaN counts as the
    largest magnitude. The gradient reaches kept entries only, those that are 0 too. `k >= d` returns `x` itself.
    ValueError if `k` is not an integer of at least 1.
    """
    _check(x, k)
    return x if k >= x.shape[-1] else _Keep.apply(x, abs_topk_mask(x, k))  # pyright: ignore[reportReturnType]


def abs_topk_eager(x: Float[Tensor, "*batch d"], k: int) -> Float[Tensor, "*batch d"]:
    """`abs_topk` in torch operations alone: its twin, the oracle of its tests."""
    _check(x, k)
    return x if k >= x.shape[-1] else torch.where(abs_topk_mask_eager(x, k), x, 0)


FEW = 8
"""Channels from which on their rows' thresholds are found after all: more looks cost more (bench_abs_topk.py)."""


@torch.no_grad()
def abs_topk_at(x: Float[Tensor, "*batch d"], k: int, channels: Sequence[int]) -> Float[Tensor, "*batch n"]:
    """`abs_topk(x, k)[..., channels]`, bit for bit and without a gradient, at less cost for a few channels.

    An entry is kept where fewer than k of its row come before it, a look at the row for each channel; no threshold has
    to be found. ValueError for a channel outside the row.
    """
    _check(x, k)
    if outside := [channel for channel in channels if not 0 <= channel < x.shape[-1]]:
        raise ValueError(f"channels={outside} lie outside a row of {x.shape[-1]}")
    if len(channels) > FEW:
        return abs_topk(x, k)[..., list(channels)]
    if not has_kernel(x):
        return torch.where(_kept_at_eager(x, k, channels), x[..., list(channels)], 0)
    bits = _BITS[x.dtype]
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous().view(bits.dtype).numpy()
    at = torch.empty(*x.shape[:-1], len(channels), dtype=x.dtype)
    out = at.view(len(rows), len(channels)).view(bits.dtype).numpy()
    compiled(_at_kernel)(rows, k, bits.infinity, np.array(channels, np.int64), out)
    return at


def _kept_at_eager(x: Float[Tensor, "*batch d"], k: int, channels: Sequence[int]) -> Bool[Tensor, "*batch n"]:
    keys = _keys(x)
    kept = torch.empty(*x.shape[:-1], len(channels), dtype=torch.bool, device=x.device)
    for i, channel in enumerate(channels):
        own = keys[..., channel, None]
        kept[..., i] = (keys > own).sum(-1) + (keys[..., :channel] == own).sum(-1) < k
    return kept


def abs_topk_mask(x: Float[Tensor, "*batch d"], k: int) -> Bool[Tensor, "*batch d"]:
    """True at the `k` entries of largest magnitude in every row, ties to the lowest index, everywhere if `k >= d`."""
    _check(x, k)
    if k >= x.shape[-1] or not has_kernel(x):
        return abs_topk_mask_eager(x, k)
    bits = _BITS[x.dtype]
    mask = torch.empty(x.shape, dtype=torch.bool)
    # reshape copies what is not contiguous; the kernel reads rows one after another.
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous().view(bits.dtype).numpy()
    compiled(_mask_kernel)(rows, k, bits.infinity, mask.view(rows.shape).numpy())
    return mask


def abs_topk_mask_eager(x: Float[Tensor, "*batch d"], k: int) -> Bool[Tensor, "*batch d"]:
    """`abs_topk_mask` in torch operations alone."""
    _check(x, k)
    if k >= x.shape[-1]:
        return torch.ones_like(x, dtype=torch.bool)
    keys = _keys(x.detach())
    threshold = keys.topk(k, sorted=False).values.amin(-1, keepdim=True)
    mask = keys >= threshold
    crowded = mask.sum(-1) > k
    if torch.compiler.is_compiling():  # no branch on values: it would break the graph
        return _break_ties(keys, threshold, k)
    if crowded.any():
        mask[crowded] = _break_ties(keys[crowded], threshold[crowded], k)
    return mask


def keep(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x where the mask is true, else 0, whatever x is there; outside autograd, and on CPUs faster than `torch.where`.

    ValueError unless x and the mask have one shape.
    """
    if x.shape != mask.shape:  # the kernel would read past the mask's end
        raise ValueError(f"mask must have the shape of x, {tuple(x.shape)}, got {tuple(mask.shape)}")
    if not has_kernel(x):
        return torch.where(mask, x, 0)
    bits = _BITS[x.dtype].dtype
    kept = torch.empty(x.shape, dtype=x.dtype)
    flat = x.detach().contiguous().view(-1).view(bits).numpy()
    compiled(_keep_kernel)(flat, mask.contiguous().view(-1).numpy(), kept.view(-1).view(bits).numpy())
    return kept


def _check(x: Tensor, k: int) -> None:
    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")
    if x.dtype not in _BITS:
        raise ValueError(f"x must be one of {', '.join(map(str, _BITS))}, got {x.dtype}")


def _keys(x: Float[Tensor, "*batch d"]) -> Int[Tensor, "*batch d"]:
    """Integers that order as magnitudes do, every NaN one above infinity."""
    bits = _BITS[x.dtype]
    return (x.view(bits.dtype) & torch.iinfo(bits.dtype).max).clamp_max(bits.infinity + 1)


def _break_ties(keys: Int[Tensor, "*batch d"], threshold: Int[Tensor, "*batch 1"], k: int) -> Bool[Tensor, "*batch d"]:
    above, ties = keys > threshold, keys == threshold
    room = k - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1) <= room))


class _Keep(torch.autograd.Function):
    """x where the mask is true, else 0; its own derivative, at every order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return keep(x, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return _Keep.apply(grads[0], *ctx.saved_tensors), None  # pyright: ignore[reportReturnType]


def _mask_kernel(rows, k, infinity, mask):  # pragma: no cover - compiled
    """Bisect every row's threshold over the magnitudes' bits, starting around the threshold of the row before."""
    n, d = rows.shape
    integer = rows.dtype.type  # comparing in the keys' own width is what lets the loops below run as SIMD
    sign_free, nan = integer(np.iinfo(rows.dtype).max), integer(infinity + 1)
    first_step = max(infinity >> 11, 1)
    keys = np.empty(d, rows.dtype)
    threshold = infinity >> 1
    for i in range(n):
        for j in range(d):
            keys[j] = min(integer(rows[i, j] & sign_free), nan)
        # `reached` >= k keys reach `low`, fewer than k reach `high`: gallop from the last threshold, then bisect.
        low, high, reached = 0, infinity + 2, d
        middle, step = threshold, first_step
        while high - low > 1 and reached != k:
            pivot = integer(middle)
            count = np.int32(0)
            for j in range(d):
                count = np.int32(count + np.int32(keys[j] >= pivot))
            if count >= k:
                low, reached, direction = middle, count, 1
            else:
                high, direction = middle, -1
            if 0 < step < high - low:
                middle += direction * step
                step *= 2
            else:
                step = 0
                middle = low + (high - low) // 2
        threshold = low
        pivot = integer(low)
        for j in range(d):
            mask[i, j] = keys[j] >= pivot
        # Ties at the threshold beyond k: the last ones go.
        j = d - 1
        while reached > k:
            if keys[j] == pivot:
                mask[i, j] = False
                reached -= 1
            j -= 1


def _at_kernel(rows, k, infinity, channels, at):  # pragma: no cover - compiled
    """The entries at some channels, 0 where k entries of their row or more come before."""
    n, d = rows.shape
    integer = rows.dtype.type
    sign_free, nan = integer(np.iinfo(rows.dtype).max), integer(infinity + 1)
    for i in range(n):
        for c in range(channels.size):
            channel = channels[c]
            own = min(integer(rows[i, channel] & sign_free), nan)
            before = np.int32(0)
            for j in range(d):  # the lower indices among equals come before
                key = min(integer(rows[i, j] & sign_free), nan)
                before = np.int32(before + np.int32(key > own))
            for j in range(channel):
                before = np.int32(before + np.int32(min(integer(rows[i, j] & sign_free), nan) == own))
            at[i, c] = rows[i, channel] if before < k else 0


def _keep_kernel(bits, mask, kept):  # pragma: no cover - compiled
    for j in range(bits.size):
        kept[j] = bits[j] if mask[j] else 0
