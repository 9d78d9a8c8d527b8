"""The closed form: ridge regression between two streams from moments gathered in one pass (method, section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.fitting.interchange import Carried
from bridges.objective.normalizers import Reduce, no_reduce


class Affine(NamedTuple):
    """x -> weight x + bias."""

    weight: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, " d_out"]


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
        """The six sums, in place."""
        return [self.n, self.x, self.y, self.xx, self.xy, self.yy]

    def __add__(self, other: Moments) -> Moments:
        """The moments of both halves; they must share their shift."""
        if not (torch.equal(self.shift_x, other.shift_x) and torch.equal(self.shift_y, other.shift_y)):
            raise ValueError("moments about different shifts do not add; gather both about one")
        merged = Moments(self.shift_x, self.shift_y)
        for into, one, two in zip(merged.tensors(), self.tensors(), other.tensors(), strict=True):
            into.copy_(one + two)
        return merged

    def reduce(self, reduce: Reduce) -> None:
        """Sum over processes: one reduction of everything."""
        flat = reduce(torch.cat([t.flatten() for t in self.tensors()]))
        parts = flat.split([t.numel() for t in self.tensors()])
        for into, part in zip(self.tensors(), parts, strict=True):
            into.copy_(part.view(into.shape))

    def solve(
        self, ridge: float, reverse: bool = False, carried: Carried | None = None, carried_weight: float = 0.0
    ) -> Affine:
        """Least squares of y on x, or of x on y when `reverse`; intercept unpenalised, float64.

        The penalty is `ridge` times the mean variance of the input's channels; `carried_weight` is that of the
        interchange loss against the NMSE. ValueError if there is nothing to regress on.
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
        if carried is not None:
            scale = carried_weight * cov_yy.trace()  # the NMSE is in parts of it
            penalised += scale * carried.squares.to(cov_xx).diag()
            cov_xy = cov_xy + scale * carried.products.to(cov_xx).T
        weight = _solve(penalised, cov_xy).T
        return Affine(weight, mean_y - weight @ mean_x)


def gather(
    chunks: Iterable[Sequence[tuple[Tensor, Tensor]]], reduce: Reduce = no_reduce, first: bool = True
) -> list[Moments]:
    """Moments of each site from chunks that hold one (x, y) per site, summed over processes.

    The shift is the first chunk's mean on the process where `first` is true, so that all processes share it.
    """
    moments: list[Moments] = []
    for chunk in chunks:
        if not moments:
            moments = [Moments(_shift(x, reduce, first), _shift(y, reduce, first)) for x, y in chunk]
        for site, (x, y) in zip(moments, chunk, strict=True):
            site.update(x, y)
    for site in moments:
        site.reduce(reduce)
    return moments


def _shift(x: Tensor, reduce: Reduce, first: bool) -> Tensor:
    mean = x.double().mean(0) if len(x) else x.new_zeros(x.shape[1], dtype=torch.float64)
    return reduce(mean if first else torch.zeros_like(mean))


def _solve(penalised: Tensor, cross: Tensor) -> Tensor:
    """penalised^-1 cross; directions without variance get weight 0 where no penalty rules them out."""
    factor, failed = torch.linalg.cholesky_ex(penalised)
    diagonal = factor.diagonal()
    if not failed and diagonal.min() > 1e-7 * diagonal.max():
        return torch.cholesky_solve(cross, factor)
    values, vectors = torch.linalg.eigh(penalised)
    inverse = torch.where(values > 1e-13 * values.max(), 1 / values, 0)
    return vectors @ (inverse[:, None] * (vectors.T @ cross))
