"""Triton twins of the compiled kernels, for GPUs; import this module only where `has_triton_kernel` says so.

`TRITON_INTERPRET=1` runs them on the CPU, tensor operation by tensor operation: tests do so. None of them makes the
host wait for the device.
"""

from __future__ import annotations

from inspect import unwrap

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Int
from torch import Tensor

from bridges.ops.triton_long_rows import magnitude_keys, topk_mask_long

MAX_WIDTH = 16_384
"""The longest row that one program holds in registers; longer ones are searched in several launches."""
_ENTRIES_PER_WARP = 512
"""Entries of a row that one warp holds in registers: 16 for each of its threads."""
_MASK_BLOCK = 2048
"""Entries that one program of `apply_mask` copies."""


def _select_row(bits, mask, values, d, k, infinity, sign_free, with_values: tl.constexpr, block: tl.constexpr):
    """One row: bisect the integer range until as many keys as possible, but at least k, reach the lower end."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < d
    raw = tl.load(bits + row * d + columns, mask=inside, other=0)
    keys = tl.where(inside, magnitude_keys(raw, infinity, sign_free), -1)
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
    if with_values:
        tl.store(values + row * d + columns, tl.where(kept, raw, 0), mask=inside)


def _copy_masked(bits, mask, out, size, block: tl.constexpr):
    """out[i] = bits[i] where mask[i], else 0."""
    entries = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = entries < size
    kept = tl.load(mask + entries, mask=inside, other=0) != 0
    # What is not kept is not read either.
    tl.store(out + entries, tl.load(bits + entries, mask=kept, other=0), mask=inside)


# The test run wraps every function in a check of its types, which Triton could not compile.
_select_row_kernel, _copy_masked_kernel = (triton.jit(unwrap(kernel)) for kernel in (_select_row, _copy_masked))


def topk_mask(
    bits: Int[Tensor, "n d"], k: int, infinity: int, mask: Bool[Tensor, "n d"], values: Int[Tensor, "n d"] | None = None
) -> None:
    """Write True at the k entries of every row whose magnitude is largest, ties to the lowest index; 0 < k < d.

    `bits` are the floats' bits as integers of the same width, `infinity` those of infinity. `values`, if given, is set
    to the bits that are kept and to 0 elsewhere; each row is read once for both. All tensors are contiguous.
    """
    with torch.cuda.device_of(bits):  # kernels start on the current device
        if bits.shape[1] > MAX_WIDTH:
            topk_mask_long(bits, k, infinity, mask, values)
        elif len(bits):
            _topk_mask_short(bits, k, infinity, mask, values)


def _topk_mask_short(
    bits: Int[Tensor, "n d"], k: int, infinity: int, mask: Bool[Tensor, "n d"], values: Int[Tensor, "n d"] | None
) -> None:
    n, d = bits.shape
    block = triton.next_power_of_2(d)
    warps = min(16, max(1, block // _ENTRIES_PER_WARP))
    out = mask if values is None else values
    limits = infinity, torch.iinfo(bits.dtype).max
    _select_row_kernel[(n,)](bits, mask, out, d, k, *limits, values is not None, block, num_warps=warps)


def apply_mask(bits: Int[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], out: Int[Tensor, "*shape"]) -> None:
    """Copy the bits where the mask is true, 0 elsewhere. All tensors are contiguous."""
    if size := bits.numel():
        with torch.cuda.device_of(bits):
            _copy_masked_kernel[(triton.cdiv(size, _MASK_BLOCK),)](bits, mask, out, size, _MASK_BLOCK)
