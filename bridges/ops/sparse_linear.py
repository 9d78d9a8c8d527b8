"""A linear map whose matrix has few nonzeros, at places that stay: their values are multiplied and get gradients.

At a density of 1/50 this is about ten times faster on CPUs than the dense product (benchmarks/bench_sparse_linear.py).
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


class Places(NamedTuple):
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
    def of(cls, mask: Tensor) -> Places:
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
    places: Places,
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
    places: Places,
    bias: Float[Tensor, " n_out"] | None = None,
) -> Float[Tensor, "*batch n_out"]:
    """`sparse_linear` through the dense matrix: its twin, the oracle of its tests."""
    flat = values.new_zeros(places.shape[0] * places.shape[1]).index_put((places.flat,), values)
    return F.linear(x, flat.view(places.shape), bias)


class _SparseLinear(torch.autograd.Function):
    """Tokens lie along the last dimension inside, so that one nonzero meets many tokens in one SIMD loop."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, places: Places) -> Tensor:
        columns = x.detach().t().contiguous()
        ctx.save_for_backward(columns, values)
        ctx.places = places
        out = x.new_empty(places.shape[0], len(x))
        _run(_multiply_kernel, places.row_starts, places.columns, values, columns, out)
        return out.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        columns, values = ctx.saved_tensors
        places, grad = ctx.places, grads[0].t().contiguous()
        to_x = to_values = None
        if ctx.needs_input_grad[0]:
            to_x = torch.empty_like(columns)
            _run(_multiply_kernel, places.column_starts, places.rows, values[places.by_column], grad, to_x)
            to_x = to_x.t()
        if ctx.needs_input_grad[1]:
            to_values = torch.empty_like(values)
            _run(_outer_kernel, places.row_starts, places.columns, grad, columns, to_values)
        return to_x, to_values, None


def _starts(counts: Int[Tensor, " n"]) -> Int[Tensor, " n_and_one"]:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _run(kernel: Any, *tensors: Tensor) -> None:
    compiled(kernel, parallel=True)(*(tensor.detach().numpy() for tensor in tensors))


_BLOCK = 256
"""Tokens at a time: as many rows of them as a matrix reads stay in the processor's second cache."""


def _multiply_kernel(starts, columns, values, x, out):  # pragma: no cover - compiled
    """out[r] = sum of values[j] x[columns[j]] over the row's nonzeros j."""
    n = x.shape[1]
    for block in prange((n + _BLOCK - 1) // _BLOCK):
        first = block * _BLOCK
        last = min(first + _BLOCK, n)
        total = np.empty(last - first, x.dtype)
        for r in range(starts.size - 1):
            total[:] = 0
            for j in range(starts[r], starts[r + 1]):
                value, row = values[j], x[columns[j], first:last]
                for t in range(last - first):
                    total[t] += value * row[t]
            out[r, first:last] = total


def _outer_kernel(starts, columns, grad, x, out):  # pragma: no cover - compiled
    """out[j] = sum over tokens of grad[row of j] x[columns[j]]."""
    for r in prange(starts.size - 1):
        for j in range(starts[r], starts[r + 1]):
            above, below = grad[r], x[columns[j]]
            total = x.dtype.type(0)
            for t in range(x.shape[1]):
                total += above[t] * below[t]
            out[j] = total
