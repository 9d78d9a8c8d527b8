"""Which tokens count, and what the losses over them are divided by, over any number of batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.objective.sums import Reduce, Sums, add_up, no_reduce


def nmse(squared_error: Float[Tensor, "*sites"], variance: Float[Tensor, "*sites"]) -> Float[Tensor, "*sites"]:
    """The normalised mean squared error: sum |p - t|^2 over sum |t - mean(t)|^2, in the dtype of the error.

    Where the target does not vary (`variance` is 0: every counted token has the same stream, or none counts), the NMSE
    is undefined. It is then NaN, and its gradient is zero.
    """
    variance = variance.to(squared_error)
    defined = variance != 0  # a target of NaN gives a variance of NaN, and must stay NaN
    # A second `where`, because the gradient of a quotient by 0 is NaN even where the quotient is not used.
    return torch.where(defined, squared_error / torch.where(defined, variance, 1), torch.nan)


class Normalizers(NamedTuple):
    """What losses are divided by, in float64. Over batches and processes the divisors add up, the ratios do not."""

    tokens: Float[Tensor, ""]
    """Real tokens, over which KL is averaged."""
    predictions: Float[Tensor, ""]
    """Real tokens that another real one follows, over which cross-entropy is averaged."""
    variance_dense: Float[Tensor, " n_sites"]
    """sum |t - mean(t)|^2 over counted tokens and channels."""
    variance_sparse: Float[Tensor, " n_sites"]
    mean_dense: Float[Tensor, "n_sites d_dense"]
    """Each bridged site's mean stream over counted tokens."""
    mean_sparse: Float[Tensor, "n_sites d_sparse"]


class BatchMoments(NamedTuple):
    """One batch's part of `Normalizers`, in float64."""

    tokens: Float[Tensor, ""]
    predictions: Float[Tensor, ""]
    counted: Float[Tensor, " n_sites"]
    """Tokens that each site's means and squares are over."""
    mean_dense: Float[Tensor, "n_sites d_dense"]
    mean_sparse: Float[Tensor, "n_sites d_sparse"]
    squares_dense: Float[Tensor, " n_sites"]
    """sum |t - mean of this batch|^2."""
    squares_sparse: Float[Tensor, " n_sites"]

    @classmethod
    def empty(cls, n_sites: int, d_dense: int, d_sparse: int, device: torch.device) -> BatchMoments:
        """The moments of no tokens, for a process that has no batch."""
        shapes = ((), (), (n_sites,), (n_sites, d_dense), (n_sites, d_sparse), (n_sites,), (n_sites,))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))


def counted_tokens(
    input_ids: Int[Tensor, "b s"], attention_mask: Int[Tensor, "b s"] | None = None
) -> Bool[Tensor, "b s"]:
    """True at the tokens that NMSE, moments and RMS may count: real tokens, without each row's first.

    The first real token is where attention sinks are; its norm, tens of times the others', would dominate. Each site
    leaves out its massive tokens too (`Bridge.is_usual`).
    """
    if attention_mask is None:
        counted = torch.ones_like(input_ids, dtype=torch.bool)
        counted[:, 0] = False
        return counted
    real = attention_mask.bool()
    return real & (real.long().cumsum(-1) > 1)


def predicting_tokens(
    input_ids: Int[Tensor, "b s"], attention_mask: Int[Tensor, "b s"] | None = None
) -> Bool[Tensor, "b s-1"]:
    """True at the tokens, without each row's last position, that are real and followed by a real token."""
    if attention_mask is None:
        return torch.ones_like(input_ids[:, 1:], dtype=torch.bool)
    real = attention_mask.bool()
    return real[:, :-1] & real[:, 1:]


def stream_moments(
    streams: Sequence[tuple[Tensor, Tensor]],
    input_ids: Int[Tensor, "b s"],
    attention_mask: Int[Tensor, "b s"] | None,
    counted: Sequence[Bool[Tensor, "b s"]] | None = None,
) -> BatchMoments:
    """The moments of one batch, from its (dense, sparse) streams [batch, seq, d_model] at every bridged site.

    `counted`: the tokens that each site counts; by default those of `counted_tokens`.
    """
    counted = [counted_tokens(input_ids, attention_mask)] * len(streams) if counted is None else counted
    (mean_dense, squares_dense), (mean_sparse, squares_sparse) = (
        _means_and_squares(side, counted) for side in zip(*streams, strict=True)
    )
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return BatchMoments(
        tokens=real.sum().to(mean_dense),
        predictions=predicting_tokens(input_ids, attention_mask).sum().to(mean_dense),
        counted=torch.stack([tokens.sum().to(mean_dense) for tokens in counted]),
        mean_dense=mean_dense,
        mean_sparse=mean_sparse,
        squares_dense=squares_dense,
        squares_sparse=squares_sparse,
    )


def combine_moments(moments: Sequence[BatchMoments], reduce: Reduce = no_reduce) -> Normalizers:
    """The normalizers of several batches together, over all processes: one reduction of means, then one of squares."""
    totals = add_up(_TokenSums.of(one) for one in moments).reduced(reduce)
    counted = totals.counted.clamp(min=1)[:, None]
    mean_dense, mean_sparse = totals.streams_dense / counted, totals.streams_sparse / counted
    squares = add_up(_Squares.about(mean_dense, mean_sparse, one) for one in moments).reduced(reduce)
    return Normalizers(totals.tokens, totals.predictions, squares.dense, squares.sparse, mean_dense, mean_sparse)


@dataclass
class _TokenSums(Sums):
    tokens: Float[Tensor, ""]
    predictions: Float[Tensor, ""]
    counted: Float[Tensor, " n_sites"]
    streams_dense: Float[Tensor, "n_sites d_dense"]
    streams_sparse: Float[Tensor, "n_sites d_sparse"]

    @classmethod
    def of(cls, one: BatchMoments) -> _TokenSums:
        weight = one.counted[:, None]
        return cls(one.tokens, one.predictions, one.counted, weight * one.mean_dense, weight * one.mean_sparse)


@dataclass
class _Squares(Sums):
    dense: Float[Tensor, " n_sites"]
    sparse: Float[Tensor, " n_sites"]

    @classmethod
    def about(cls, mean_dense: Tensor, mean_sparse: Tensor, one: BatchMoments) -> _Squares:
        """sum |t - mean|^2 over one batch, from its squares about its own mean."""

        def moved(squares: Tensor, offset: Tensor) -> Tensor:
            return squares + one.counted * offset.square().sum(1)

        return cls(
            moved(one.squares_dense, one.mean_dense - mean_dense),
            moved(one.squares_sparse, one.mean_sparse - mean_sparse),
        )


def _means_and_squares(streams: Sequence[Tensor], counted: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean [n_sites, d_model] and sum of squares about it [n_sites] over each site's counted tokens.

    The other tokens add zeros, whatever they hold; to take them out would make the host wait for a GPU.
    """
    means, squares = [], []
    for h, tokens in zip(streams, counted, strict=True):
        kept = tokens.to(h.device)[..., None]
        # A batch whose rows have one real token each counts none.
        mean = torch.where(kept, h.detach().double(), 0).flatten(0, -2).sum(0) / kept.sum().clamp(min=1)
        means.append(mean.to(streams[0].device))
        squares.append(torch.where(kept, h.detach() - mean, 0).square().sum().to(streams[0].device))
    return torch.stack(means), torch.stack(squares)
