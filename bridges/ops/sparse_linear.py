"""A linear map whose matrix has few nonzeros, at places that stay: their values are multiplied and get gradients.

At a density of 1/80 this is three to seven times faster on CPUs than the dense product
(benchmarks/bench_sparse_linear.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from bridges.ops.compiled import compiled, has_kernel

try:
    from numba import prange
except ImportError:
    prange = range


class NonzeroPattern(NamedTuple):
    """Where the nonzeros of a matrix [out, in] stand, sorted by row and, for its transpose, by column."""

    shape: tuple[int, int]
    flat: Int[Tensor, " nonzeros"]
    """Index into the flattened matrix, ascending: the order of the values."""
    columns: Int[Tensor, " nonzeros"]
    row_starts: Int[Tensor, " out_and_one"]
    by_column: Int[Tensor, " nonzeros"]
    """The values' order when the matrix is read column by column."""
    rows: Int[Tensor, " nonzeros"]
    """Row of each value in that order."""
    column_starts: Int[Tensor, " in_and_one"]

    @classmethod
    def from_mask(cls, mask: Tensor) -> NonzeroPattern:
        """The places where a boolean matrix [out, in] is true."""
        n_out, n_in = mask.shape
        flat = mask.flatten().nonzero().squeeze(1)
        by_column = (flat % n_in * n_out + flat // n_in).argsort()
        return cls(
            (n_out, n_in),
            flat,
            flat % n_in,
            _starts(mask.sum(1)),
            by_column,
            (flat // n_in)[by_column],
            _starts(mask.sum(0)),
        )


def sparse_linear(
    x: Float[Tensor, "*batch n_in"],
    values: Float[Tensor, " nonzeros"],
    places: NonzeroPattern,
    bias: Float[Tensor, " n_out"] | None = None,
) -> Float[Tensor, "*batch n_out"]:
    """x W' + bias for the matrix W that holds `values` at `places` and zeros elsewhere.

    The gradient reaches x, the values and the bias. Compiled on CPUs where numba is installed; elsewhere the dense
    product.
    """
    if not (has_kernel(x) and x.dtype == values.dtype and x.dtype in (torch.float32, torch.float64)):
        return sparse_linear_eager(x, values, places, bias)
    y = _SparseLinear.apply(x.flatten(0, -2), values, places).unflatten(0, x.shape[:-1])  # pyright: ignore
    return y if bias is None else y + bias


def sparse_linear_eager(
    x: Float[Tensor, "*batch n_in"],
    values: Float[Tensor, " nonzeros"],
    places: NonzeroPattern,
    bias: Float[Tensor, " n_out"] | None = None,
) -> Float[Tensor, "*batch n_out"]:
    """`sparse_linear` through the dense matrix: its twin, the oracle of its tests."""
    flat = values.new_zeros(places.shape[0] * places.shape[1]).index_put((places.flat,), values)
    return F.linear(x, flat.view(places.shape), bias)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, places: NonzeroPattern) -> Tensor:
        x = x.detach().contiguous()
        ctx.save_for_backward(x, values)
        ctx.places = places
        out = x.new_empty(len(x), places.shape[0])
        _run(_multiply_kernel, places.row_starts, places.columns, values, x, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, values = ctx.saved_tensors
        places, grad = ctx.places, grads[0].contiguous()
        to_x = to_values = None
        if ctx.needs_input_grad[0]:
            to_x = torch.empty_like(x)
            _run(_multiply_kernel, places.column_starts, places.rows, values[places.by_column], grad, to_x)
        if ctx.needs_input_grad[1]:
            blocks = values.new_empty((len(x) + _BLOCK - 1) // _BLOCK, len(values))
            _run(_outer_kernel, places.row_starts, places.columns, grad, x, blocks)
            to_values = blocks.sum(0)
        return to_x, to_values, None


def _starts(counts: Int[Tensor, " n"]) -> Int[Tensor, " n_and_one"]:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _run(kernel: Any, *tensors: Tensor) -> None:
    compiled(kernel, parallel=True)(*(tensor.detach().numpy() for tensor in tensors))


_BLOCK = 128
"""Tokens at a time: turned so that tokens lie side by side, they stay in the processor's second cache, and one nonzero
meets all of them in one SIMD loop."""
_TILE = 16
"""What is turned together: a line of the first cache."""


def _multiply_kernel(starts, columns, values, x, out):  # pragma: no cover - compiled
    """out[t, r] = sum of values[j] x[t, columns[j]] over the row's nonzeros j."""
    n, width = x.shape
    rows = starts.size - 1
    for block in prange((n + _BLOCK - 1) // _BLOCK):
        first = block * _BLOCK
        size = min(_BLOCK, n - first)
        turned = np.empty((width, _BLOCK), x.dtype)
        for low in range(0, size, _TILE):
            for c in range(width):
                for t in range(low, min(low + _TILE, size)):
                    turned[c, t] = x[first + t, c]
        totals = np.empty((_TILE, _BLOCK), x.dtype)
        for low in range(0, rows, _TILE):
            high = min(low + _TILE, rows)
            for r in range(low, high):
                total = totals[r - low]
                total[:] = 0
                for j in range(starts[r], starts[r + 1]):
                    value, row = values[j], turned[columns[j]]
                    for t in range(size):
                        total[t] += value * row[t]
            for t in range(size):
                for r in range(low, high):
                    out[first + t, r] = totals[r - low, t]


def _outer_kernel(starts, columns, grad, x, out):  # pragma: no cover - compiled
    """out[block, j] = sum over the block's tokens of grad[t, row of j] x[t, columns[j]]."""
    n, width = x.shape
    rows = starts.size - 1
    for block in prange((n + _BLOCK - 1) // _BLOCK):
        first = block * _BLOCK
        size = min(_BLOCK, n - first)
        turned = np.empty((width, _BLOCK), x.dtype)
        for low in range(0, size, _TILE):
            for c in range(width):
                for t in range(low, min(low + _TILE, size)):
                    turned[c, t] = x[first + t, c]
        above = np.empty((rows, _BLOCK), x.dtype)
        for low in range(0, size, _TILE):
            for r in range(rows):
                for t in range(low, min(low + _TILE, size)):
                    above[r, t] = grad[first + t, r]
        for r in range(rows):
            for j in range(starts[r], starts[r + 1]):
                one, other = above[r], turned[columns[j]]
                total = x.dtype.type(0)
                for t in range(size):
                    total += one[t] * other[t]
                out[block, j] = total
