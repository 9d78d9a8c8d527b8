"""Numba kernels for CPUs. Importing this module imports numba, so it is imported where a kernel is called."""

import numpy as np
from numba import prange

from bridges.ops.compiled import compiled, compiled_parallel

BLOCK = 128
"""Tokens that one thread works on at a time: transposed, they stay in the processor's second-level cache, and each
nonzero is multiplied with all of them in one SIMD loop."""
_TILE = 16
"""Rows that are transposed back together: float32 values in a line of the first-level cache."""
_BRACKET_BITS = 12
"""Leading bits of a magnitude that `topk_mask_long` counts by: the counts stay in the first-level cache."""
_LANES = 8
"""Tokens that are transposed together."""


@compiled
def topk_mask(rows, k, infinity, mask):  # pragma: no cover - compiled
    """Mark the k largest magnitudes of each row; `rows` are the bits of floats, `infinity` those of infinity.

    Each row's threshold is found by bisection over the bits, starting at the threshold of the row before.
    """
    n, d = rows.shape
    integer = rows.dtype.type  # comparing in the keys' own width is what lets the loops below run as SIMD
    sign_free, nan = integer(np.iinfo(rows.dtype).max), integer(infinity + 1)
    first_step = max(infinity >> 11, 1)
    keys = np.empty(d, rows.dtype)
    threshold = infinity >> 1
    for i in range(n):
        for j in range(d):
            keys[j] = min(integer(rows[i, j] & sign_free), nan)
        # `reached` >= k keys reach `low`, fewer than k reach `high`: double the step from the last row's threshold
        # until both are known, then bisect.
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
        # Of the entries that tie at the threshold, the last ones beyond k are dropped.
        j = d - 1
        while reached > k:
            if keys[j] == pivot:
                mask[i, j] = False
                reached -= 1
            j -= 1


@compiled
def topk_mask_long(row, k, infinity, mask):  # pragma: no cover - compiled
    """`topk_mask` of one long row: magnitudes are counted by their leading bits, and one bracket is searched."""
    integer = row.dtype.type
    sign_free, nan = integer(np.iinfo(row.dtype).max), integer(infinity + 1)
    shift = integer(8 * row.itemsize - 1 - _BRACKET_BITS)
    counts = np.zeros(1 << _BRACKET_BITS, np.int64)
    for j in range(row.size):
        counts[min(integer(row[j] & sign_free), nan) >> shift] += 1
    bracket, above = counts.size - 1, 0
    while above + counts[bracket] < k:
        above += counts[bracket]
        bracket -= 1
    inside = np.empty(counts[bracket], row.dtype)
    n = 0
    for j in range(row.size):
        key = min(integer(row[j] & sign_free), nan)
        if key >> shift == bracket:
            inside[n] = key
            n += 1
    pivot = np.partition(inside, n - (k - above))[n - (k - above)]
    reached = above
    for i in range(n):
        reached += inside[i] >= pivot
    for j in range(row.size):
        mask[j] = min(integer(row[j] & sign_free), nan) >= pivot
    # Of the entries that tie at the threshold, the last ones beyond k are dropped.
    j = row.size - 1
    while reached > k:
        if min(integer(row[j] & sign_free), nan) == pivot:
            mask[j] = False
            reached -= 1
        j -= 1


@compiled
def topk_at(rows, k, infinity, channels, out):  # pragma: no cover - compiled
    """Copy the entries at `channels`, or 0 where at least k entries of the row rank before one."""
    n, d = rows.shape
    integer = rows.dtype.type
    sign_free, nan = integer(np.iinfo(rows.dtype).max), integer(infinity + 1)
    for i in range(n):
        for c in range(channels.size):
            channel = channels[c]
            own = min(integer(rows[i, channel] & sign_free), nan)
            before = np.int32(0)
            for j in range(d):
                key = min(integer(rows[i, j] & sign_free), nan)
                before = np.int32(before + np.int32(key > own))
            for j in range(channel):  # of equal entries, those of lower index rank before
                before = np.int32(before + np.int32(min(integer(rows[i, j] & sign_free), nan) == own))
            out[i, c] = rows[i, channel] if before < k else 0


@compiled
def apply_mask(bits, mask, out):  # pragma: no cover - compiled
    """Copy the bits where the mask is true, 0 elsewhere."""
    for j in range(bits.size):
        out[j] = bits[j] if mask[j] else 0


@compiled
def _transpose_block(x, first, size, out):  # pragma: no cover - compiled
    """out[c, t] = x[first + t, c] for t < size."""
    low = 0
    while low + _LANES <= size:  # a loop of fixed length, which becomes SIMD: four times as fast
        for c in range(x.shape[1]):
            line = out[c, low : low + _LANES]
            for t in range(_LANES):
                line[t] = x[first + low + t, c]
        low += _LANES
    for c in range(x.shape[1]):
        for t in range(low, size):
            out[c, t] = x[first + t, c]


@compiled
def _write_tile(totals, first, size, low, high, out):  # pragma: no cover - compiled
    """out[first + t, low + r] = totals[r, t] for t < size and r < high - low."""
    if high - low == _TILE:  # a loop of fixed length, as above
        for t in range(size):
            line = out[first + t, low : low + _TILE]
            for r in range(_TILE):
                line[r] = totals[r, t]
    else:
        for t in range(size):
            for r in range(low, high):
                out[first + t, r] = totals[r - low, t]


@compiled_parallel
def multiply(starts, columns, values, bias, x, out):  # pragma: no cover - compiled
    """out[t, r] = bias[r] + sum over the nonzeros j of row r of values[j] x[t, columns[j]]."""
    n, width = x.shape
    rows = starts.size - 1
    for block in prange((n + BLOCK - 1) // BLOCK):
        first = block * BLOCK
        size = min(BLOCK, n - first)
        x_transposed = np.empty((width, BLOCK), x.dtype)
        _transpose_block(x, first, size, x_transposed)
        totals = np.empty((_TILE, BLOCK), x.dtype)
        for low in range(0, rows, _TILE):
            high = min(low + _TILE, rows)
            for r in range(low, high):
                total = totals[r - low]
                total[:] = bias[r]
                for j in range(starts[r], starts[r + 1]):
                    value, row = values[j], x_transposed[columns[j]]
                    for t in range(size):
                        total[t] += value * row[t]
            _write_tile(totals, first, size, low, high, out)


@compiled_parallel
def values_gradient(starts, columns, grad, x, out):  # pragma: no cover - compiled
    """out[block, j] = sum over the block's tokens t of grad[t, row of j] x[t, columns[j]]."""
    n, width = x.shape
    rows = starts.size - 1
    for block in prange((n + BLOCK - 1) // BLOCK):
        first = block * BLOCK
        size = min(BLOCK, n - first)
        x_transposed, grad_transposed = np.empty((width, BLOCK), x.dtype), np.empty((rows, BLOCK), x.dtype)
        _transpose_block(x, first, size, x_transposed)
        _transpose_block(grad, first, size, grad_transposed)
        for r in range(rows):
            for j in range(starts[r], starts[r + 1]):
                grad_row, x_row = grad_transposed[r], x_transposed[columns[j]]
                total = x.dtype.type(0)
                for t in range(size):
                    total += grad_row[t] * x_row[t]
                out[block, j] = total


@compiled_parallel
def both_gradients(column_starts, rows, values, by_column, grad, x, x_grad, out):  # pragma: no cover - compiled
    """x_grad[t, c] = sum over the nonzeros j of column c of values[j] grad[t, rows[j]]; `values_gradient` into `out`.

    `values` and `rows` are in the order of columns, `by_column` is their index in the order of rows. Each row of the
    gradient is read once for both.
    """
    n, width = x.shape
    for block in prange((n + BLOCK - 1) // BLOCK):
        first = block * BLOCK
        size = min(BLOCK, n - first)
        x_transposed, grad_transposed = np.empty((width, BLOCK), x.dtype), np.empty((grad.shape[1], BLOCK), x.dtype)
        _transpose_block(x, first, size, x_transposed)
        _transpose_block(grad, first, size, grad_transposed)
        totals = np.empty((_TILE, BLOCK), x.dtype)
        for low in range(0, width, _TILE):
            high = min(low + _TILE, width)
            for c in range(low, high):
                total, x_row = totals[c - low], x_transposed[c]
                total[:] = 0
                for j in range(column_starts[c], column_starts[c + 1]):
                    value, grad_row = values[j], grad_transposed[rows[j]]
                    product = x.dtype.type(0)
                    for t in range(size):
                        total[t] += value * grad_row[t]
                        product += grad_row[t] * x_row[t]
                    out[block, by_column[j]] = product
            _write_tile(totals, first, size, low, high, x_grad)
