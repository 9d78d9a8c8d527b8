"""A linear map whose matrix has few nonzeros at fixed positions: only they are multiplied and get gradients.

At a density of 1/80 this is several times as fast on CPUs as the dense product, the more so the wider the matrix
(benchmarks/bench_sparse_linear.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from bridges.ops.compiled import has_parallel_kernel


class NonzeroPattern(NamedTuple):
    """The positions of a matrix's nonzeros, sorted by row and, for the product with the transpose, by column."""

    shape: tuple[int, int]
    """(out, in) of the matrix."""
    flat: Int[Tensor, " nonzeros"]
    """Index of each nonzero into the flattened matrix, ascending: the order of the values."""
    columns: Int[Tensor, " nonzeros"]
    """Column of each nonzero, in the order of the values."""
    row_starts: Int[Tensor, " out_and_one"]
    """Row r holds the values from row_starts[r] up to row_starts[r + 1]."""
    by_column: Int[Tensor, " nonzeros"]
    """Permutation that sorts the values by column, then by row."""
    rows: Int[Tensor, " nonzeros"]
    """Row of each nonzero, in the order of `by_column`."""
    column_starts: Int[Tensor, " in_and_one"]
    """Column c holds the values by_column[column_starts[c] : column_starts[c + 1]]."""

    @classmethod
    def from_mask(cls, mask: Bool[Tensor, "n_out n_in"]) -> NonzeroPattern:
        """The pattern whose nonzeros are where the mask is true."""
        n_out, n_in = mask.shape
        flat = mask.flatten().nonzero().squeeze(1)
        rows, columns = flat // n_in, flat % n_in
        by_column = (columns * n_out + rows).argsort()
        row_starts, column_starts = _starts(mask.sum(1)), _starts(mask.sum(0))
        return cls((n_out, n_in), flat, columns, row_starts, by_column, rows[by_column], column_starts)


def sparse_linear(
    x: Float[Tensor, "*batch n_in"],
    values: Float[Tensor, " nonzeros"],
    pattern: NonzeroPattern,
    bias: Float[Tensor, " n_out"] | None = None,
) -> Float[Tensor, "*batch n_out"]:
    """x W' + bias for the matrix W that has `values` at the positions of `pattern` and zeros elsewhere.

    The gradient reaches x, the values and the bias. Zeros are not multiplied, so they hide what is NaN or infinite in
    x, which 0 * NaN would not. Computed by a kernel on CPUs where numba is installed, for float32 and float64;
    otherwise by the dense product, and so in a process forked after the kernel had run (on one thread: RuntimeError on
    more, which would hang).
    """
    if not _runs_kernel(x, values, bias):
        return sparse_linear_eager(x, values, pattern, bias)
    return _on_rows(_SparseLinear, x, values, bias, pattern)


def dense_gradient_linear(
    x: Float[Tensor, "*batch n_in"],
    weight: Float[Tensor, "n_out n_in"],
    pattern: NonzeroPattern,
    bias: Float[Tensor, " n_out"] | None = None,
) -> Float[Tensor, "*batch n_out"]:
    """x W' + bias for a matrix W that is zero outside `pattern`, with a gradient for every entry of W.

    The product and the gradient of x multiply by nonzeros alone; that of W is a dense product. Falls back to the dense
    product where `sparse_linear` does.
    """
    if not _runs_kernel(x, weight, bias):
        return F.linear(x, weight, bias)
    return _on_rows(_DenseGradientLinear, x, weight, bias, pattern)


def sparse_linear_eager(
    x: Float[Tensor, "*batch n_in"],
    values: Float[Tensor, " nonzeros"],
    pattern: NonzeroPattern,
    bias: Float[Tensor, " n_out"] | None = None,
) -> Float[Tensor, "*batch n_out"]:
    """`sparse_linear` by the dense product: the reference implementation, used in tests."""
    flat = values.new_zeros(pattern.shape[0] * pattern.shape[1]).index_put((pattern.flat,), values)
    return F.linear(x, flat.view(pattern.shape), bias)


def _runs_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    dtypes = {x.dtype, weight.dtype, x.dtype if bias is None else bias.dtype}
    return has_parallel_kernel(x) and len(dtypes) == 1 and x.dtype in (torch.float32, torch.float64)


def _on_rows(
    function: type[torch.autograd.Function], x: Tensor, weight: Tensor, bias: Tensor | None, pattern: NonzeroPattern
) -> Tensor:
    """Apply one of the functions below to the rows of x, of any batch shape."""
    bias = x.new_zeros(pattern.shape[0]) if bias is None else bias
    y = function.apply(x.reshape(-1, x.shape[-1]), weight, bias, pattern)
    return y.view(*x.shape[:-1], pattern.shape[0])  # pyright: ignore[reportAttributeAccessIssue]


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor, pattern: NonzeroPattern) -> Tensor:
        x = x.detach().contiguous()
        ctx.save_for_backward(x, values)
        ctx.pattern = pattern
        return _product(x, values, bias, pattern)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from bridges.ops import kernels

        x, values = ctx.saved_tensors
        pattern, grad = ctx.pattern, grads[0].contiguous()
        wants_x, wants_values, wants_bias, _ = ctx.needs_input_grad
        bias_grad = grad.sum(0) if wants_bias else None
        if not wants_values:
            return _input_gradient(grad, values, pattern) if wants_x else None, None, bias_grad, None
        blocks = values.new_empty((len(x) + kernels.BLOCK - 1) // kernels.BLOCK, len(values))
        if not wants_x:
            kernels.values_gradient(*_arrays(pattern.row_starts, pattern.columns, grad, x, blocks))
            return None, blocks.sum(0), bias_grad, None
        x_grad = torch.empty_like(x)
        by_column = pattern.column_starts, pattern.rows, values[pattern.by_column], pattern.by_column
        kernels.both_gradients(*_arrays(*by_column, grad, x, x_grad, blocks))
        return x_grad, blocks.sum(0), bias_grad, None


class _DenseGradientLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, pattern: NonzeroPattern) -> Tensor:
        x, values = x.detach().contiguous(), weight.detach().flatten()[pattern.flat]
        ctx.save_for_backward(x, values)
        ctx.pattern = pattern
        return _product(x, values, bias, pattern)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        grad = grads[0].contiguous()
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        x_grad = _input_gradient(grad, values, ctx.pattern) if wants_x else None
        return x_grad, grad.mT @ x if wants_weight else None, grad.sum(0) if wants_bias else None, None


def _product(x: Tensor, values: Tensor, bias: Tensor, pattern: NonzeroPattern) -> Tensor:
    """x W' + bias for rows x [n, n_in], by the kernel."""
    from bridges.ops import kernels

    out = x.new_empty(len(x), pattern.shape[0])
    kernels.multiply(*_arrays(pattern.row_starts, pattern.columns, values, bias, x, out))
    return out


def _input_gradient(grad: Tensor, values: Tensor, pattern: NonzeroPattern) -> Tensor:
    """grad W for rows grad [n, n_out], by the kernel."""
    from bridges.ops import kernels

    x_grad = grad.new_empty(len(grad), pattern.shape[1])
    by_column = pattern.column_starts, pattern.rows, values[pattern.by_column]
    kernels.multiply(*_arrays(*by_column, grad.new_zeros(pattern.shape[1]), grad, x_grad))
    return x_grad


def _starts(counts: Int[Tensor, " n"]) -> Int[Tensor, " n_and_one"]:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in tensors]
