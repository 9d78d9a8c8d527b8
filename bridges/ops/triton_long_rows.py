"""The k largest magnitudes of rows too long for one program, such as whole weight tensors: a radix select on the GPU.

The key of the k-th largest entry is found digit by digit, from the leading one: a histogram of the digit over the
entries that share the digits found so far, then the bin in which the k-th largest lies. Whatever is found stays in
device memory, so the host waits for nothing. A last pass writes the mask. Among entries of equal key those of lowest
index are kept, which takes a count of them by block, if not all of them are kept.
"""

from __future__ import annotations

import math
from inspect import unwrap

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Int
from torch import Tensor

_DIGIT_BITS = 11
"""Three digits make a key of float32, and a histogram of one takes 8 KiB of shared memory."""
_BLOCK = 8192
"""Entries that a program looks at together."""
_WARPS = 8
_MAX_COUNTING_PROGRAMS = 1024
"""Programs that count digits, at most: each adds a whole histogram to the one in memory at its end."""


def _magnitude_keys(raw, infinity, sign_free):
    """Integers in the order of the magnitudes, every NaN one above infinity, wide enough for one more."""
    keys = (raw & sign_free).to(tl.int64 if raw.dtype == tl.int64 else tl.int32)
    return tl.minimum(keys, infinity + 1)


# The test run wraps every function in a check of its types, which Triton could not compile.
magnitude_keys = triton.jit(unwrap(_magnitude_keys))


def _count_digits(
    bits, state, counts, d, programs, shift, infinity, sign_free, first: tl.constexpr, bits_of_digit: tl.constexpr,
    steps: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Add the histogram of one digit over a part of a row, of the entries that share the digits found before."""
    bins: tl.constexpr = 1 << bits_of_digit  # pyright: ignore[reportOperatorIssue]
    row = (tl.program_id(0) // programs).to(tl.int64)
    part = tl.program_id(0) % programs
    found = tl.load(state + 3 * row)
    total = tl.zeros([bins], tl.int32)
    for step in range(steps):
        columns = (step * programs + part) * block + tl.arange(0, block)
        counted = columns < d
        keys = magnitude_keys(tl.load(bits + row * d + columns, mask=counted, other=0), infinity, sign_free)
        if not first:
            counted = counted & ((keys >> (shift + bits_of_digit)) == (found >> (shift + bits_of_digit)))
        digits = ((keys >> shift) & (bins - 1)).to(tl.int32)
        total += tl.histogram(digits, bins, mask=counted)
    places = tl.arange(0, bins)
    tl.atomic_add(counts + row * bins + places, total, mask=total > 0)


def _choose_digit(state, counts, shift, bits_of_digit: tl.constexpr):
    """Note the bin in which the last kept entry of a row lies, and clear the counts."""
    bins: tl.constexpr = 1 << bits_of_digit  # pyright: ignore[reportOperatorIssue]
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, bins)
    count = tl.load(counts + row * bins + places)
    remaining = tl.load(state + 3 * row + 1)
    reached = tl.sum(count, 0) - tl.cumsum(count, 0) + count  # entries in this bin or a higher one
    digit = tl.sum((reached >= remaining).to(tl.int32), 0) - 1  # pyright: ignore[reportOperatorIssue]
    found = tl.load(state + 3 * row) + (digit.to(tl.int64) << shift)
    tl.store(state + 3 * row, found)
    tl.store(state + 3 * row + 1, remaining - tl.sum(tl.where(places > digit, count, 0), 0))
    tl.store(state + 3 * row + 2, tl.sum(tl.where(places == digit, count, 0), 0).to(tl.int64))
    tl.store(counts + row * bins + places, tl.zeros([bins], tl.int32))


def _count_ties(bits, state, ties, d, blocks, infinity, sign_free, block: tl.constexpr):
    """The number of entries of a block that equal the last kept one; nothing is read where all of these are kept."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * block + tl.arange(0, block)
    inside = columns < d
    threshold = tl.load(state + 3 * row)
    if tl.load(state + 3 * row + 1) != tl.load(state + 3 * row + 2):
        keys = magnitude_keys(tl.load(bits + row * d + columns, mask=inside, other=0), infinity, sign_free)
        equal = inside & (keys == threshold)
        tl.store(ties + tl.program_id(0), tl.sum(equal.to(tl.int32), 0))


def _write_mask(
    bits, state, ties_up_to, ties, mask, values, d, blocks, infinity, sign_free, with_values: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """The mask of a block: all above the threshold, and the first of those that equal it."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * block + tl.arange(0, block)
    inside = columns < d
    threshold = tl.load(state + 3 * row)
    remaining = tl.load(state + 3 * row + 1)
    raw = tl.load(bits + row * d + columns, mask=inside, other=0)
    keys = magnitude_keys(raw, infinity, sign_free)
    kept = keys >= threshold
    if remaining != tl.load(state + 3 * row + 2):
        before = tl.load(ties_up_to + tl.program_id(0)) - tl.load(ties + tl.program_id(0))
        equal = inside & (keys == threshold)
        kept = kept & ((keys > threshold) | (before + tl.cumsum(equal.to(tl.int32), 0) <= remaining))
    tl.store(mask + row * d + columns, kept, mask=inside)
    if with_values:
        tl.store(values + row * d + columns, tl.where(kept, raw, 0), mask=inside)


_count_digits_kernel, _choose_digit_kernel, _count_ties_kernel, _write_mask_kernel = (
    triton.jit(unwrap(kernel)) for kernel in (_count_digits, _choose_digit, _count_ties, _write_mask)
)


def topk_mask_long(
    bits: Int[Tensor, "n d"], k: int, infinity: int, mask: Bool[Tensor, "n d"], values: Int[Tensor, "n d"] | None = None
) -> None:
    """`topk_mask` for rows of any length, up to `MAX_TRITON_ENTRIES`."""
    n, d = bits.shape
    if not n:
        return
    keys = infinity, torch.iinfo(bits.dtype).max
    state = _find_thresholds(bits, k, *keys)
    blocks = math.ceil(d / _BLOCK)
    ties = torch.zeros(n, blocks, dtype=torch.int32, device=bits.device)
    _count_ties_kernel[(n * blocks,)](bits, state, ties, d, blocks, *keys, _BLOCK, num_warps=_WARPS)
    out = mask if values is None else values
    _write_mask_kernel[(n * blocks,)](
        *(bits, state, ties.cumsum(1), ties, mask, out, d, blocks, *keys, values is not None, _BLOCK), num_warps=_WARPS
    )


def _find_thresholds(bits: Int[Tensor, "n d"], k: int, infinity: int, sign_free: int) -> Int[Tensor, "n 3"]:
    """Of every row the key of its k-th largest entry, how many that equal it are kept, and how many equal it."""
    n, d = bits.shape
    programs = min(math.ceil(d / _BLOCK), _MAX_COUNTING_PROGRAMS)
    steps = math.ceil(d / (programs * _BLOCK))
    # The digits found, as a key; how many to keep of the entries that share them; the number of these entries.
    state = torch.zeros(n, 3, dtype=torch.int64, device=bits.device)
    state[:, 1] = k
    counts = torch.zeros(n, 1 << _DIGIT_BITS, dtype=torch.int32, device=bits.device)
    key_bits = 8 * bits.element_size() - 1
    for shift in reversed(range(0, key_bits, _DIGIT_BITS)):
        first = shift + _DIGIT_BITS >= key_bits
        _count_digits_kernel[(n * programs,)](
            *(bits, state, counts, d, programs, shift, infinity, sign_free, first, _DIGIT_BITS, steps, _BLOCK),
            num_warps=_WARPS,
        )
        _choose_digit_kernel[(n,)](state, counts, shift, _DIGIT_BITS, num_warps=_WARPS)
    return state
