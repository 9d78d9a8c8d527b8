"""Triton twins of the compiled kernels, for GPUs; import this module only where `has_triton_kernel` says so.

`TRITON_INTERPRET=1` runs them on the CPU, tensor operation by tensor operation: tests do so.
"""

from __future__ import annotations

from inspect import unwrap

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Int
from torch import Tensor

_ENTRIES_PER_WARP = 512
"""Entries of a row that one warp holds in registers: 16 for each of its threads."""


def _topk_mask_row(bits, mask, d, k, infinity, sign_free, block: tl.constexpr):  # pragma: no cover - compiled
    """One row: bisect the integer range until as many keys as possible, but at least k, reach the lower end."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < d
    keys = tl.load(bits + row * d + columns, mask=inside, other=0)
    # Wide enough for `high`, one above NaN's key; arithmetic in 16 bits would overflow.
    keys = (keys & sign_free).to(tl.int64 if keys.dtype == tl.int64 else tl.int32)
    keys = tl.where(inside, tl.minimum(keys, infinity + 1), -1)
    low = infinity * 0
    high = infinity + 2
    reached = d
    while (high - low > 1) & (reached != k):
        middle = low + (high - low) // 2
        count = tl.sum((keys >= middle).to(tl.int32))
        if count >= k:
            low = middle
            reached = count
        else:
            high = middle
    above = keys > low
    ties = keys == low
    n_missing = k - tl.sum(above.to(tl.int32))
    kept = above | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= n_missing))
    tl.store(mask + row * d + columns, kept, mask=inside)


_topk_mask_kernel = triton.jit(unwrap(_topk_mask_row))  # the test run wraps every function in a check of its types


def topk_mask(bits: Int[Tensor, "n d"], k: int, infinity: int) -> Bool[Tensor, "n d"]:
    """True at the k entries of every row whose magnitude is largest, ties to the lowest index; k < d.

    `bits` are the floats' bits as integers of the same width, contiguous; `infinity` are those of infinity.
    """
    n, d = bits.shape
    mask = torch.empty(n, d, dtype=torch.bool, device=bits.device)
    if n:
        block = triton.next_power_of_2(d)
        warps = min(16, max(1, block // _ENTRIES_PER_WARP))
        _topk_mask_kernel[(n,)](bits, mask, d, k, infinity, torch.iinfo(bits.dtype).max, block, num_warps=warps)
    return mask
