"""The closed form: ridge regression between two standardised streams, from moments gathered in one pass.

Source: method, section 3. Both streams are standardised channel by channel, so that the penalty means the same for a
channel of any scale; the solutions are given as plain weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.objective.sums import Reduce, no_reduce, reduce_together

RIDGES = tuple(10.0**exponent for exponent in range(-9, 2))
"""The penalties that `Moments.choose_ridge` chooses from."""
RIDGE_MARGIN = 0.01
"""How much more error than the least a penalty may have, as a share of it."""
EXACT = 1e-9
"""NMSE that counts as none."""
STD_FLOOR = 1e-3
"""The least standard deviation that a channel is divided by, in units of the RMS over channels of all of them."""


class Affine(NamedTuple):
    """x -> weight x + bias."""

    weight: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, " d_out"]


class Moments:
    """Running n, sum x, sum y, X'X, X'Y, Y'Y of paired rows, about a fixed shift, in float64.

    Products are made in float64 too. In float32 they are off by a ten-millionth, and where some directions of the
    inputs do not vary, as those of sparse embeddings, a small penalty divides by just that: such a solution sends a
    token that is new to it a hundred times too far.
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
        x, y = x.double() - self.shift_x, y.double() - self.shift_y
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        with torch.autocast(x.device.type, enabled=False):  # of a run in mixed precision
            self.xx += x.T @ x
            self.xy += x.T @ y
            self.yy += y.T @ y

    def tensors(self) -> list[Tensor]:
        """The six sums themselves, not copies."""
        return [self.n, self.x, self.y, self.xx, self.xy, self.yy]

    def __add__(self, other: Moments) -> Moments:
        """The moments of the rows of both, about the shift of this one."""
        total = Moments(self.shift_x, self.shift_y)
        for into, one, two in zip(total.tensors(), self.tensors(), other._about(self).tensors(), strict=True):
            into.copy_(one + two)
        return total

    def _about(self, other: Moments) -> Moments:
        """The same rows' moments about the shift of `other`."""
        if torch.equal(self.shift_x, other.shift_x) and torch.equal(self.shift_y, other.shift_y):
            return self
        moved = Moments(other.shift_x, other.shift_y)
        off_x, off_y = self.shift_x - other.shift_x, self.shift_y - other.shift_y
        moved.n.copy_(self.n)
        moved.x.copy_(self.x + self.n * off_x)
        moved.y.copy_(self.y + self.n * off_y)
        # sum (a + u)(b + v)' = sum ab' + (sum a) v' + u (sum b + n v)'
        moved.xx.copy_(self.xx + torch.outer(self.x, off_x) + torch.outer(off_x, moved.x))
        moved.xy.copy_(self.xy + torch.outer(self.x, off_y) + torch.outer(off_x, moved.y))
        moved.yy.copy_(self.yy + torch.outer(self.y, off_y) + torch.outer(off_y, moved.y))
        return moved

    def reduce(self, reduce: Reduce) -> None:
        """Sum over processes, which must share the shift: one reduction of everything."""
        for into, total in zip(self.tensors(), reduce_together(self.tensors(), reduce), strict=True):
            into.copy_(total)

    def solve(self, ridge: float, reverse: bool = False, freedom: Float[Tensor, " d_in"] | None = None) -> Affine:
        """Ridge regression of y on x, or of x on y when `reverse`, in float64.

        It minimises the mean square error of each output plus `ridge` times the square of its weights on the
        standardised input (an input channel has variance 1), each divided by the channel's `freedom` where that is
        given; the intercept is not penalised. Raises ValueError if there are fewer than two rows.
        """
        mean, cov = self._mean(), self._covariances()
        if reverse:
            mean, cov = mean.reversed(), cov.reversed()
        std = _units(cov.xx, freedom)
        penalised = cov.xx / torch.outer(std, std) + ridge * torch.eye(len(std)).to(std)
        weight = (_solve(penalised, cov.xy / std[:, None]) / std[:, None]).T
        return Affine(weight, mean.y - weight @ mean.x)

    def choose_ridge(
        self, heldout: Moments, reverse: bool = False, freedom: Float[Tensor, " d_in"] | None = None
    ) -> float:
        """The penalty of `RIDGES` whose solution on these rows has about the least square error on the `heldout` rows.

        Of those within `RIDGE_MARGIN` of the least it is the largest: what separates them on the rows at hand is
        chance, and a small one costs dearly where a token comes that is in neither. One eigendecomposition gives the
        errors of all penalties. Raises ValueError if there are fewer than two rows.
        """
        mean, cov = self._mean(), self._covariances()
        other = heldout._covariances(mean)
        if reverse:
            cov, other = cov.reversed(), other.reversed()
        std = _units(cov.xx, freedom)
        values, vectors = torch.linalg.eigh(cov.xx / torch.outer(std, std))
        to_eigen = vectors / std[:, None]  # from input channels to the eigenvectors of the standardised inputs
        onto = to_eigen.T @ cov.xy  # [d_in, d_out], weights are onto / (values + ridge)
        linear = (onto * (to_eigen.T @ other.xy)).sum(1)
        quadratic = (to_eigen.T @ other.xx @ to_eigen) * (onto @ onto.T)
        # Rounding leaves eigenvalues a little under 0 where the inputs span fewer directions than they have channels.
        shrunk = [1 / (values.clamp(min=0) + ridge) for ridge in RIDGES]
        total = other.yy.trace().item()
        errors = [total + (one @ quadratic @ one - 2 * one @ linear).item() for one in shrunk]
        # A square under 0 is rounding that a small penalty has made large, where inputs hardly vary in some direction.
        errors = [error if error >= -EXACT * total else math.inf for error in errors]
        allowed = (1 + RIDGE_MARGIN) * min(errors) + EXACT * total
        return max(ridge for ridge, error in zip(RIDGES, errors, strict=True) if error <= allowed)

    def nmse(self, solution: Affine, reverse: bool = False) -> float:
        """NMSE of the solution's predictions of y (of x when `reverse`) on these rows; 0 / 0 where nothing varies.

        Raises ValueError if there are fewer than two rows.
        """
        mean, cov = self._mean(), self._covariances()
        if reverse:
            mean, cov = mean.reversed(), cov.reversed()
        weight = solution.weight.to(cov.xx)
        off = weight @ mean.x + solution.bias.to(cov.xx) - mean.y
        error = ((weight @ cov.xx) * weight).sum() - 2 * (weight * cov.xy.T).sum() + cov.yy.trace() + off @ off
        return (error / cov.yy.trace()).item()

    def _mean(self) -> _Mean:
        if self.n < 2:
            raise ValueError(f"the closed form needs at least 2 tokens, got {int(self.n)}; pass more data")
        return _Mean(self.x / self.n + self.shift_x, self.y / self.n + self.shift_y)

    def standardization(self) -> tuple[Standardization, Standardization]:
        """Mean and standard deviation of every channel of x, and of y."""
        mean, cov = self._mean(), self._covariances()
        return (
            Standardization(mean.x, standard_deviations(cov.xx)),
            Standardization(mean.y, standard_deviations(cov.yy)),
        )

    def _covariances(self, mean: _Mean | None = None) -> _Covariances:
        """Mean products of the deviations from `mean`, which is these rows' own by default."""
        n = self.n.clamp(min=1)
        own_x, own_y = self.x / n, self.y / n
        # E (a - m)(b - m)' = cov(a, b) + (mean a - m)(mean b - m)'
        off_x = off_y = None
        if mean is not None:
            off_x, off_y = own_x + self.shift_x - mean.x, own_y + self.shift_y - mean.y
        return _Covariances(
            _covariance(self.xx / n, own_x, own_x, off_x, off_x),
            _covariance(self.xy / n, own_x, own_y, off_x, off_y),
            _covariance(self.yy / n, own_y, own_y, off_y, off_y),
        )


class Standardization(NamedTuple):
    """What a stream is standardised by: (h - mean) / std, per channel, in float64."""

    mean: Float[Tensor, " d"]
    std: Float[Tensor, " d"]


class _Mean(NamedTuple):
    x: Tensor
    y: Tensor

    def reversed(self) -> _Mean:
        return _Mean(self.y, self.x)


class _Covariances(NamedTuple):
    xx: Tensor
    xy: Tensor
    yy: Tensor

    def reversed(self) -> _Covariances:
        return _Covariances(self.yy, self.xy.T, self.xx)


def _covariance(product: Tensor, a: Tensor, b: Tensor, off_a: Tensor | None, off_b: Tensor | None) -> Tensor:
    cov = product - torch.outer(a, b)
    return cov if off_a is None or off_b is None else cov + torch.outer(off_a, off_b)


def standard_deviations(cov: Float[Tensor, "d d"]) -> Float[Tensor, " d"]:
    """The standard deviation of every channel, at least `STD_FLOOR` of their RMS; 1 where no channel varies."""
    variances = cov.diagonal().clamp(min=0)
    std = variances.sqrt().clamp(min=(STD_FLOOR * variances.mean().sqrt()).item())
    return torch.where(std > 0, std, 1.0)


def _units(cov: Float[Tensor, "d d"], freedom: Float[Tensor, " d"] | None) -> Float[Tensor, " d"]:
    """What an input channel is divided by, so that all weights are penalised alike."""
    std = standard_deviations(cov)
    return std if freedom is None else std / freedom.to(std)


def gather(chunks: Iterable[Iterable[tuple[Tensor, Tensor]]], reduce: Reduce = no_reduce) -> list[Moments]:
    """The moments of each site over all processes, from chunks that hold one (x, y) per site.

    A chunk may have no rows, but every process needs at least one chunk. The shift, which all processes must share, is
    the mean of their first chunks.
    """
    moments: list[Moments] = []
    for chunk in chunks:
        for i, (x, y) in enumerate(chunk):
            if i == len(moments):
                moments.append(Moments(*_shared_means(x, y, reduce)))
            moments[i].update(x, y)
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
