"""The closed form: ridge regression between two streams from moments gathered in one pass (method, section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.objective.sums import Reduce, no_reduce, reduce_together


class Affine(NamedTuple):
    """x -> weight x + bias."""

    weight: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, " d_out"]


class Penalty(NamedTuple):
    """A quadratic term in the weight W [d_out, d_in] that is minimised together with the NMSE of W x + bias.

    weight * (sum_c diagonal[c] |W[:, c]|^2 - 2 sum(cross * W))
    """

    diagonal: Float[Tensor, " d_in"]
    cross: Float[Tensor, "d_out d_in"]
    weight: float


class Moments:
    """Running n, sum x, sum y, X'X, X'Y, Y'Y of paired rows, about a fixed shift, in float64.

    The shift keeps float32 products accurate: uncentred they lose the variance under the mean. Chunks are multiplied
    in the wider of their dtypes (at least float32) and added up in float64.
    """

    def __init__(self, shift_x: Float[Tensor, " d_x"], shift_y: Float[Tensor, " d_y"]):
        self.shift_x, self.shift_y = shift_x.double(), shift_y.double()
        d_x, d_y, device = len(shift_x), len(shift_y), shift_x.device
        self.n = torch.zeros((), dtype=torch.float64, device=device)
        self.x, self.y = self.shift_x.new_zeros(d_x), self.shift_x.new_zeros(d_y)
        self.xx, self.yy = self.shift_x.new_zeros(d_x, d_x), self.shift_x.new_zeros(d_y, d_y)
        self.xy = self.shift_x.new_zeros(d_x, d_y)

    def update(self, x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"]) -> None:
        """Add the rows of one chunk."""
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        # Rounded after the subtraction: a rounded shift would be off by one and the same amount in every row.
        x, y = (x.double() - self.shift_x).to(dtype), (y.double() - self.shift_y).to(dtype)
        self.n += len(x)
        self.x += x.sum(0, dtype=torch.float64)
        self.y += y.sum(0, dtype=torch.float64)
        with torch.autocast(x.device.type, enabled=False):  # of a run in mixed precision
            self.xx += x.T @ x
            self.xy += x.T @ y
            self.yy += y.T @ y

    def tensors(self) -> list[Tensor]:
        """The six sums themselves, not copies."""
        return [self.n, self.x, self.y, self.xx, self.xy, self.yy]

    def __add__(self, other: Moments) -> Moments:
        """The moments of the rows of both; ValueError unless they are about the same shift."""
        if not (torch.equal(self.shift_x, other.shift_x) and torch.equal(self.shift_y, other.shift_y)):
            raise ValueError("moments about different shifts cannot be added; gather both about the same shift")
        total = Moments(self.shift_x, self.shift_y)
        for into, one, two in zip(total.tensors(), self.tensors(), other.tensors(), strict=True):
            into.copy_(one + two)
        return total

    def reduce(self, reduce: Reduce) -> None:
        """Sum over processes, which must share the shift: one reduction of everything."""
        for into, total in zip(self.tensors(), reduce_together(self.tensors(), reduce), strict=True):
            into.copy_(total)

    def solve(self, ridge: float, reverse: bool = False, penalty: Penalty | None = None) -> Affine:
        """Ridge regression of y on x, or of x on y when `reverse`, in float64.

        The ridge is `ridge` times the mean variance of the input's channels; the intercept is not penalised. `penalty`
        is added to the NMSE. Raises ValueError if there are fewer than two rows.
        """
        if self.n < 2:
            raise ValueError(f"the closed form needs at least 2 tokens, got {int(self.n)}; pass more data")
        mean_x, mean_y = self.x / self.n, self.y / self.n
        cov_xx = self.xx / self.n - torch.outer(mean_x, mean_x)
        cov_yy = self.yy / self.n - torch.outer(mean_y, mean_y)
        cov_xy = self.xy / self.n - torch.outer(mean_x, mean_y)
        mean_x, mean_y = mean_x + self.shift_x, mean_y + self.shift_y
        if reverse:
            cov_xx, cov_xy, cov_yy, mean_x, mean_y = cov_yy, cov_xy.T, cov_xx, mean_y, mean_x
        penalised = cov_xx + ridge * cov_xx.trace() / len(cov_xx) * torch.eye(len(cov_xx)).to(cov_xx)
        if penalty is not None:
            scale = penalty.weight * cov_yy.trace()  # the covariances are those of the NMSE times the target's variance
            penalised += scale * penalty.diagonal.to(cov_xx).diag()
            cov_xy = cov_xy + scale * penalty.cross.to(cov_xx).T
        weight = _solve(penalised, cov_xy).T
        return Affine(weight, mean_y - weight @ mean_x)


def gather(chunks: Iterable[Sequence[tuple[Tensor, Tensor]]], reduce: Reduce = no_reduce) -> list[Moments]:
    """The moments of each site over all processes, from chunks that hold one (x, y) per site.

    A chunk may have no rows, but every process needs at least one chunk. The shift, which all processes must share, is
    the mean of their first chunks.
    """
    moments: list[Moments] = []
    for chunk in chunks:
        if not moments:
            moments = [Moments(*_shared_means(x, y, reduce)) for x, y in chunk]
        for site, (x, y) in zip(moments, chunk, strict=True):
            site.update(x, y)
    for site in moments:
        site.reduce(reduce)
    return moments


def _shared_means(x: Tensor, y: Tensor, reduce: Reduce) -> list[Tensor]:
    """The means of x and of y over the rows of all processes, zero where there are none."""
    n = torch.tensor(len(x), dtype=torch.float64, device=x.device)
    n, *sums = reduce_together([n, x.double().sum(0), y.double().sum(0)], reduce)
    return [total / n.clamp(min=1) for total in sums]


def _solve(penalised: Tensor, cross: Tensor) -> Tensor:
    """penalised^-1 cross; without a penalty, directions of the input that do not vary get weight 0."""
    factor, failed = torch.linalg.cholesky_ex(penalised)
    diagonal = factor.diagonal()
    if not failed and diagonal.min() > 1e-7 * diagonal.max():
        return torch.cholesky_solve(cross, factor)
    values, vectors = torch.linalg.eigh(penalised)
    inverse = torch.where(values > 1e-13 * values.max(), 1 / values, 0)
    return vectors @ (inverse[:, None] * (vectors.T @ cross))
