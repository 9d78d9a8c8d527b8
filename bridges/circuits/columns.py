"""Matrices of which most columns are the same in every row, and what a layer under masks does with them.

Where most inputs of a linear map are frozen at their means, most of its outputs are constants. AbsTopK then ranks the
columns that vary, and the constants near its threshold, alone. Gradients reach the columns that are on and, as
everywhere, the parameters of all masks. For a node that is off that is what turning it on would change: it takes the
node's values and the gradients of the outputs that are on, but no backward pass through nodes that are off.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bridges.circuits.masks import surrogate_slope
from bridges.models.sparse.blocks import AbsTopK, RMSNorm
from bridges.ops.abs_topk import abs_topk, abs_topk_mask, apply_mask


class Columns(NamedTuple):
    """A matrix [rows, d] of which most columns are constants."""

    constant: Float[Tensor, " d"]
    """The value of each column that is not in `index`."""
    index: Int[Tensor, " varying"]
    """The other columns, ascending."""
    values: Float[Tensor, "rows varying"]

    @classmethod
    def whole(cls, values: Float[Tensor, "rows d"]) -> Columns:
        """A matrix all of whose columns vary."""
        d = values.shape[1]
        return cls(values.new_zeros(d), torch.arange(d, device=values.device), values)

    def expanded(self) -> Float[Tensor, "rows d"]:
        """The matrix."""
        rows = self.constant.expand(len(self.values), -1)
        return rows.index_copy(1, self.index, self.values) if len(self.index) else rows

    def live(self, on: Bool[Tensor, " d"]) -> Live:
        """With the values of the columns that are on, all of which must vary."""
        at = on[self.index].nonzero().squeeze(1)
        return Live(self, at, self.values[:, at])

    def take(self, rows: Int[Tensor, " taken"]) -> Columns:
        """Some of its rows."""
        return self._replace(values=self.values[rows])

    def split(self, parts: int) -> list[Columns]:
        """Equal parts of its columns."""
        found, size = [], len(self.constant) // parts
        for i in range(parts):
            own = (self.index // size == i).nonzero().squeeze(1)
            constant = self.constant[i * size : (i + 1) * size]
            found.append(Columns(constant, self.index[own] - i * size, self.values[:, own]))
        return found


class Live(NamedTuple):
    """A matrix before its mask, and its columns that are on apart: they alone get gradients."""

    columns: Columns
    at: Int[Tensor, " live"]
    """Which of the varying columns are on."""
    values: Float[Tensor, "rows live"]


def read_columns(
    norm: nn.Module,
    keep: AbsTopK,
    residual: Float[Tensor, "rows d_model"],
    positions: Float[Tensor, "rows d_pos"] | None,
    on: Bool[Tensor, " d_read"],
) -> Live:
    """What a sublayer reads: the norm of the stream, then the positions' channels after a norm of their own.

    Where few columns are on, an RMSNorm's gradient is a multiple of the stream, but in these.
    """
    if not isinstance(norm, RMSNorm):
        return Columns.whole(keep(_beside(norm(residual), positions))).live(on)
    at = on.nonzero().squeeze(1)
    with torch.no_grad():
        read = _beside(norm(residual), positions)
        kept = None if keep.k is None or keep.k >= read.shape[1] else abs_topk_mask(read, keep.k)
        read = read if kept is None else apply_mask(read, kept)
    live_kept = torch.ones_like(read[:, at]) if kept is None else kept[:, at].to(read.dtype)
    values = _LiveRead.apply(residual, norm.weight, read[:, at], live_kept, at)
    return Live(Columns.whole(read), at, values)  # pyright: ignore[reportArgumentType]


def _beside(read: Float[Tensor, "rows d_model"], positions: Float[Tensor, "rows d_pos"] | None) -> Tensor:
    return read if positions is None else torch.cat([read, positions], dim=-1)


class _LiveRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, gain: Tensor, values: Tensor, kept: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(residual, gain, kept, at)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        residual, gain, kept, at = ctx.saved_tensors
        width = residual.shape[1]
        of_stream = (at < width).nonzero().squeeze(1)
        at = at[of_stream]
        eps = torch.finfo(torch.float64 if residual.dtype == torch.float64 else torch.float32).eps
        square = torch.linalg.vector_norm(residual, dim=1, keepdim=True).square()
        scale = (square / width + eps).rsqrt()
        direct = (grads[0] * kept)[:, of_stream] * gain[at] * scale
        along = (direct * residual[:, at]).sum(1, keepdim=True) * scale.square() / width
        return (residual * -along).index_add_(1, at, direct), None, None, None, None


def topk_columns(keep: AbsTopK, x: Columns) -> Columns:
    """AbsTopK of the matrix, ties to the lowest column as everywhere.

    A constant is among the k largest of every row, or of none, unless its rank among constants is within the number of
    varying columns of k; these few become varying columns.
    """
    d, n_varying = len(x.constant), len(x.index)
    if keep.k is None or keep.k >= d:
        return x
    is_constant = torch.ones(d, dtype=torch.bool, device=x.index.device)
    is_constant[x.index] = False
    order = x.constant.abs().masked_fill(~is_constant, -1).argsort(descending=True, stable=True)[: d - n_varying]
    n_sure = max(0, keep.k - n_varying)
    sure, near = order[:n_sure], order[n_sure : keep.k]
    constant = torch.zeros_like(x.constant)
    constant[sure] = x.constant[sure]
    if not n_varying:
        return x._replace(constant=constant)
    index, by_index = torch.cat([x.index, near]).sort()
    values = torch.cat([x.values, x.constant[near].expand(len(x.values), -1)], dim=1)[:, by_index]
    return Columns(constant, index, abs_topk(values, keep.k - n_sure))


class Matrix(NamedTuple):
    """A linear map with the positions of its nonzeros."""

    linear: nn.Linear
    rows: Int[Tensor, " nonzeros"]
    columns: Int[Tensor, " nonzeros"]

    @classmethod
    def of(cls, linear: nn.Linear) -> Matrix:
        """With the nonzeros that it has now."""
        rows, columns = linear.weight.detach().nonzero().T
        return cls(linear, rows, columns)

    def masked(
        self, x: Live, parameter: Float[Tensor, " n_in"], mean: Float[Tensor, " n_in"], wanted: Bool[Tensor, " n_out"]
    ) -> Columns:
        """The map of the masked matrix, of whose columns those that are `wanted` get gradients, whatever varies."""
        on = parameter.detach() > 0
        constant = self.linear(torch.where(on, 0, mean)[None])[0]
        varies = wanted.index_fill(0, self.rows[on[self.columns]], True)
        outputs = varies.nonzero().squeeze(1)
        values = _MaskedLinear.apply(x.values, parameter, mean, self.linear.weight, constant, x, outputs, wanted)
        return Columns(constant, outputs, values)  # pyright: ignore[reportArgumentType]


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, live: Tensor, parameter: Tensor, mean: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        constant, x, outputs, wanted = rest
        inputs = x.columns.index[x.at]
        of_wanted = wanted[outputs].nonzero().squeeze(1)
        ctx.save_for_backward(parameter, mean, weight, *x.columns, inputs, outputs, of_wanted)
        return torch.addmm(constant[outputs], live, weight[outputs[:, None], inputs].T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parameter, mean, weight, constant, index, values, inputs, outputs, of_wanted = ctx.saved_tensors
        grad, weight = grads[0][:, of_wanted], weight[outputs[of_wanted]]
        # Of the loss with respect to each input, summed over rows, and times the input.
        total = grad.sum(0) @ weight
        times_x = total * constant
        times_x[index] = (weight[:, index] * (grad.T @ values)).sum(0)
        gradient = (times_x - total * mean) * surrogate_slope(parameter)
        return grad @ weight[:, inputs], gradient, *[None] * 6


def add_masked(
    residual: Float[Tensor, "rows d"], x: Live, parameter: Float[Tensor, " d"], mean: Float[Tensor, " d"]
) -> Float[Tensor, "rows d"]:
    """The stream plus the masked matrix."""
    return _AddMasked.apply(residual, x.values, parameter, mean, x)  # pyright: ignore[reportReturnType]


class _AddMasked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, live: Tensor, parameter: Tensor, mean: Tensor, x: Live) -> Tensor:
        inputs = x.columns.index[x.at]
        ctx.save_for_backward(parameter, mean, *x.columns, inputs)
        return (residual + torch.where(parameter > 0, 0, mean)).index_add_(1, inputs, live)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parameter, mean, constant, index, values, inputs = ctx.saved_tensors
        grad = grads[0]
        total = grad.sum(0)
        times_x = total * constant
        times_x[index] = (grad[:, index] * values).sum(0)
        gradient = (times_x - total * mean) * surrogate_slope(parameter)
        return grad, grad[:, inputs], gradient, None, None
