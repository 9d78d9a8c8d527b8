"""Which tokens count, and what the losses over them are divided by, over any number of batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over processes."""


def no_reduce(tensor: Tensor) -> Tensor:
    """The reduction of a single process."""
    return tensor


class Normalizers(NamedTuple):
    """The divisors of a step's losses, float64; over batches and processes their parts add up, ratios do not."""

    tokens: Float[Tensor, ""]
    """Real tokens, over which KL is averaged."""
    predictions: Float[Tensor, ""]
    """Real tokens that another real one follows, over which cross-entropy is averaged."""
    variance_dense: Float[Tensor, " n_sites"]
    """sum |t - mean(t)|^2 over counted tokens and channels."""
    variance_sparse: Float[Tensor, " n_sites"]
    means: list[tuple[Tensor, Tensor]]
    """Each bridged site's mean (dense, sparse) stream over counted tokens."""


class BatchMoments(NamedTuple):
    """One batch's part in a `Normalizers`, float64; a list entry per bridged site, each (dense, sparse)."""

    tokens: int
    predictions: int
    count: int
    means: list[tuple[Tensor, Tensor]]
    squares: list[tuple[Tensor, Tensor]]
    """sum |t - mean of this batch|^2."""


def counted_tokens(
    input_ids: Int[Tensor, "b s"], attention_mask: Int[Tensor, "b s"] | None = None
) -> Bool[Tensor, "b s"]:
    """True at the tokens that NMSE, moments and RMS count: real ones, each row's first left out.

    The first real token is where attention sinks stand; its norm, tens of times the rest, would dominate.
    """
    if attention_mask is None:
        counted = torch.ones_like(input_ids, dtype=torch.bool)
        counted[:, 0] = False
        return counted
    real = attention_mask.bool()
    return real & (real.long().cumsum(-1) > 1)


def predicting(
    input_ids: Int[Tensor, "b s"], attention_mask: Int[Tensor, "b s"] | None = None
) -> Bool[Tensor, "b s-1"]:
    """True at the tokens, the row's last place aside, that are real and followed by a real one."""
    if attention_mask is None:
        return torch.ones_like(input_ids[:, 1:], dtype=torch.bool)
    real = attention_mask.bool()
    return real[:, :-1] & real[:, 1:]


def stream_moments(
    streams: Sequence[tuple[Tensor, Tensor]], input_ids: Tensor, attention_mask: Tensor | None
) -> BatchMoments:
    """The share of one batch, from the (dense, sparse) streams at every bridged site."""
    counted = counted_tokens(input_ids, attention_mask)
    means, squares = [], []
    for site in streams:
        moments = [_mean_and_square(h, counted) for h in site]
        means.append(tuple(mean for mean, _ in moments))
        squares.append(tuple(square for _, square in moments))
    tokens = input_ids.numel() if attention_mask is None else int(attention_mask.sum())
    return BatchMoments(tokens, int(predicting(input_ids, attention_mask).sum()), int(counted.sum()), means, squares)


def combine_moments(shares: Sequence[BatchMoments], reduce: Reduce = no_reduce) -> Normalizers:
    """The divisors of several batches together, over all processes: one sum of means, then one of squares."""
    sites = range(len(shares[0].means))
    device = shares[0].means[0][0].device

    def flat(share: BatchMoments) -> Tensor:
        header = torch.tensor([share.tokens, share.predictions, share.count], dtype=torch.float64, device=device)
        means = [share.count * mean.to(device) for site in share.means for mean in site]
        return torch.cat([header, *means])

    total = reduce(torch.stack([flat(share) for share in shares]).sum(0))
    widths = [len(mean) for site in shares[0].means for mean in site]
    overall = (total[3:] / total[2].clamp(min=1)).split(widths)
    squares = torch.zeros(len(sites), 2, dtype=torch.float64, device=device)
    for share in shares:
        for i in sites:
            for side in (0, 1):
                off = share.means[i][side].to(device) - overall[2 * i + side]
                squares[i, side] += share.squares[i][side].to(device) + share.count * off.square().sum()
    squares = reduce(squares)
    means = list(zip(overall[::2], overall[1::2], strict=True))
    return Normalizers(total[0], total[1], squares[:, 0], squares[:, 1], means)


def _mean_and_square(h: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    h = h.detach()[counted.to(h.device)].double()
    mean = h.sum(0) / max(len(h), 1)  # a batch of single tokens counts none
    return mean, (h - mean).square().sum()
