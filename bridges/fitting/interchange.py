"""The interchange loss: one channel alone should carry what changes when one token of a row does.

Where sparse channels move together, many decoders reconstruct the dense stream equally well, and least squares spreads
what one token means over all channels that go with it. Of those decoders this picks one whose single channels are
stronger handles on the dense model. That says nothing of what the sparse model does with them.

A row x and its twin x' differ in one token, drawn from the dense model. From there on they differ by dh in the dense
stream and by dz in the sparse one, and the pair's channel c is the one whose change alone does most, to first order, to
bring both models from their output on x to that on x'. Then, over tokens and the pairs that have such a channel,

    interchange[i] = sum |dh - W_dec[:, c] dz_c|^2 / sum |dh|^2

The pairs name no task. Interchanging activations between inputs, as a training signal: Geiger et al. 2022
(arXiv 2112.00826).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from bridges.models.residual import Trace
from bridges.objective.hybrid import SIDES, ModelPair, residuals_at, trace_pair
from bridges.objective.normalizers import Reduce, no_reduce, predicting
from bridges.ops.kl import kl_divergence

Draws = Float[Tensor, "_ 2"]
"""Two numbers in [0, 1) per row: which token is replaced, and by which. Batches need not have one size."""
PairBatch = tuple[Tensor, Tensor | None, Draws]
"""input_ids and attention_mask, [batch, seq] each, and the draws."""


class Carried(NamedTuple):
    """What single channels have to carry at one site: all that the loss needs, it being quadratic in the decoder."""

    squares: Float[Tensor, " d_sparse"]
    """Per channel the sum of dz_c^2 over the tokens of the pairs that chose it; in parts of sum |dh|^2."""
    products: Float[Tensor, "d_dense d_sparse"]
    """The same sum of dh dz_c."""

    def loss(self, weight: Float[Tensor, "d_dense d_sparse"]) -> Float[Tensor, ""]:
        """The part of the dense change, 0 to 1 for a decoder that helps, that the pairs' channels leave out."""
        squares, products = self.squares.to(weight), self.products.to(weight)
        return 1 + (weight.square() * squares).sum() - 2 * (weight * products).sum()


class Twin(NamedTuple):
    """A batch with one token of every row replaced."""

    input_ids: Int[Tensor, "b s"]
    after: Bool[Tensor, "b s"]
    """True at the replaced token and at the real ones after it."""


@torch.no_grad()
def gather_carried(
    pair: ModelPair, batches: Iterable[PairBatch], sites: Sequence[int], reduce: Reduce = no_reduce
) -> list[Carried]:
    """What single channels have to carry at some bridged sites, summed over processes.

    Channels are chosen by the bridges as they are, so these must be fitted already. FloatingPointError names a site
    whose figures are not finite.
    """
    decoders = [pair.bridge_set[i].decoder_weight for i in sites]
    sums = [_Sums(decoder) for decoder in decoders]
    for input_ids, attention_mask, draws in batches:
        shown = trace_pair(pair, input_ids, attention_mask, differentiable=True)
        _refuse_not_finite(shown.dense.logits, attention_mask, "the dense model's logits")
        twin = twin_rows(shown.dense.logits, input_ids, attention_mask, draws)
        changed = trace_pair(pair, twin.input_ids, attention_mask)
        towards = {side: toward(shown.side(side), changed.side(side).logits, twin.after) for side in SIDES}
        for one, decoder, i in zip(sums, decoders, sites, strict=True):
            after = twin.after.to(decoder.device)[..., None]
            streams = zip(residuals_at(pair, shown, i), residuals_at(pair, changed, i), strict=True)
            dh, dz = (torch.where(after, other.double() - h.double(), 0) for h, other in streams)
            gradients = [torch.where(after, towards[s][pair.site(s, i)].to(after.device).double(), 0) for s in SIDES]
            for tensor in (dh, dz, *gradients):
                _refuse_not_finite(tensor, None, f"a stream or its gradient at site {pair.bridge_set.sites[i]}")
            one.add(*chosen_channels(decoder, dz, *gradients), dh, dz)
    return [one.carried(reduce) for one in sums]


class _Sums:
    """The sums behind one site's `Carried`."""

    def __init__(self, decoder: Tensor):
        self.decoder = decoder
        self.squares = torch.zeros(decoder.shape[1], dtype=torch.float64, device=decoder.device)
        self.products = torch.zeros(*decoder.T.shape, dtype=torch.float64, device=decoder.device)
        self.total = torch.zeros(1, dtype=torch.float64, device=decoder.device)

    def add(self, channel: Tensor, found: Tensor, dh: Tensor, dz: Tensor) -> None:
        """The rows for which a channel was found."""
        channel, dh, dz = channel[found], dh[found], dz[found]
        one = dz.gather(2, channel[:, None, None].expand(-1, dz.shape[1], 1))
        self.squares.index_add_(0, channel, one.square().sum((1, 2)))
        self.products.index_add_(0, channel, (one * dh).sum(1))
        self.total += dh.square().sum()

    def carried(self, reduce: Reduce) -> Carried:
        """In parts of the whole change over all processes, in the decoder's dtype."""
        flat = reduce(torch.cat([self.squares, self.products.flatten(), self.total]))
        total = torch.where(flat[-1] > 0, flat[-1], torch.inf)  # no channel helped any pair: nothing is asked of any
        parts = (flat / total).to(self.decoder.dtype)
        n = len(self.squares)
        return Carried(parts[:n].clone(), parts[n:-1].view_as(self.decoder.T).T.contiguous())


def _refuse_not_finite(tensor: Tensor, mask: Tensor | None, what: str) -> None:
    real = tensor if mask is None else tensor[mask.bool().to(tensor.device)]
    if not real.isfinite().all():
        raise FloatingPointError(
            f"interchange loss: {what} is not finite; look for weights that are NaN, or for a dtype that overflows"
        )


def twin_rows(
    logits: Float[Tensor, "b s vocab"],
    input_ids: Int[Tensor, "b s"],
    attention_mask: Int[Tensor, "b s"] | None,
    draws: Draws,
) -> Twin:
    """Replace one token per row by another that the model, whose `logits` these are, might have put there.

    The place is drawn evenly among the real tokens that a real one precedes, the token by the model's own probability.
    """
    draws, rows = draws.double(), torch.arange(len(input_ids))
    counted = F.pad(predicting(input_ids, attention_mask), (1, 0))
    nth = (draws[:, 0] * counted.sum(1)).long()
    place = (counted & (counted.long().cumsum(1) == nth[:, None] + 1)).long().argmax(1)
    there = counted.any(1)  # place is 0 elsewhere: nothing can be replaced in such a row
    real = torch.ones_like(counted) if attention_mask is None else attention_mask.bool()
    after = real & there[:, None] & (torch.arange(counted.shape[1]) >= place[:, None])
    p = logits[rows, (place - 1).clamp(min=0)].double().softmax(-1).cpu().clamp(min=1e-30)
    p[rows, input_ids[rows, place]] = 0
    cumulated = p.cumsum(-1)
    token = torch.searchsorted(cumulated, draws[:, 1:] * cumulated[:, -1:], right=True)[:, 0]
    twin = input_ids.clone()
    twin[rows[there], place[there]] = token[there].to(twin)
    return Twin(twin, after)


def toward(trace: Trace, logits: Float[Tensor, "b s vocab"], after: Bool[Tensor, "b s"]) -> list[Tensor]:
    """At every site of a differentiable trace the gradient of minus the KL from `logits` to its own, over `after`.

    Where the stream should go for the model to say there what it says on the twin.
    """
    after = after.to(logits.device)
    with torch.enable_grad():
        return list(torch.autograd.grad(-kl_divergence(logits[after], trace.logits[after]), trace.residuals))


def chosen_channels(
    weight: Float[Tensor, "d_dense d_sparse"],
    dz: Float[Tensor, "b s d_sparse"],
    to_dense: Float[Tensor, "b s d_dense"],
    to_sparse: Float[Tensor, "b s d_sparse"],
) -> tuple[Int[Tensor, " b"], Bool[Tensor, " b"]]:
    """Per row the channel of largest product of first-order effects on both models, and whether any helps both."""
    with torch.autocast(dz.device.type, enabled=False):
        in_dense = torch.einsum("bsd,dc,bsc->bc", to_dense, weight.to(to_dense), dz)
    in_sparse = (to_sparse * dz).sum(1)
    best, channel = (in_dense.clamp(min=0) * in_sparse.clamp(min=0)).max(1)
    return channel, best > 0
