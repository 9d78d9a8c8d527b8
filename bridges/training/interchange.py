"""The interchange loss: one channel alone should carry what changes when one token of a row does.

Where sparse channels move together, many decoders reconstruct the dense stream equally well, and least squares spreads
what one token means over all channels that go with it. Of those decoders this picks one whose single channels can be
turned. A row x and its twin x' differ in one token, drawn from the dense model. From there on they differ by dh in the
dense stream and by dz in the sparse one, and the pair's channel c is the one whose change alone does most, to first
order, to bring both models from their output on x to that on x'. Then, over pairs and tokens,

    interchange[i] = sum |dh - W_dec[:, c] dz_c|^2 / sum |dh|^2

The pairs know no task. Interchanging activations between inputs, as a training signal: Geiger et al. 2022
(arXiv 2112.00826).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.models.residual import Trace
from bridges.ops.kl import kl_divergence
from bridges.training.hybrid import SIDES, ModelPair, residuals_at, trace_pair
from bridges.training.scale import Reduce, alone, counted_tokens

Draws = Float[Tensor, "b two"]
"""Two numbers in [0, 1) per row: which token is replaced, and by which."""
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
    pair: ModelPair, batches: Iterable[PairBatch], sites: Sequence[int], reduce: Reduce = alone
) -> list[Carried]:
    """What single channels have to carry at some bridged sites, summed over processes.

    Channels are chosen by the bridges as they are, so these must be fitted already.
    """
    d_dense, d_sparse = pair.dense.d_model, pair.sparse.d_model
    sums = torch.zeros(len(sites), d_sparse * (1 + d_dense) + 1, dtype=torch.float64)
    for input_ids, attention_mask, draws in batches:
        shown = trace_pair(pair, input_ids, attention_mask, differentiable=True)
        twin = twin_rows(shown.dense.logits, input_ids, attention_mask, draws)
        changed = trace_pair(pair, twin.input_ids, attention_mask)
        towards = {side: toward(shown.side(side), changed.side(side).logits, twin.after) for side in SIDES}
        for row, i in zip(sums, sites, strict=True):
            (h, z), (other_h, other_z) = residuals_at(pair, shown, i), residuals_at(pair, changed, i)
            after = twin.after.to(h.device)[..., None]
            dh, dz = torch.where(after, other_h - h, 0), torch.where(after, other_z - z, 0)
            gradients = [towards[side][pair.site(side, i)].to(h.device) for side in SIDES]
            channel, found = chosen_channels(pair.bridge_set[i].decoder_weight, dz, *gradients)
            one = dz.gather(2, channel[:, None, None].expand(-1, dz.shape[1], 1))[found].double().cpu()
            channel, dh = channel[found].cpu(), dh[found].double().cpu()
            squares, products, total = row[:d_sparse], row[d_sparse:-1].view(d_sparse, d_dense), row[-1:]
            squares.index_add_(0, channel, one.square().sum((1, 2)))
            products.index_add_(0, channel, (one * dh).sum(1))
            total += dh.square().sum()
    sums = reduce(sums.to(pair.bridge_set[0].decoder_weight.device))
    found = []
    for squares, products, total in ((row[:d_sparse], row[d_sparse:-1], row[-1]) for row in sums):
        total = torch.where(total > 0, total, torch.inf)  # no channel helped any pair: nothing is asked of any
        found.append(Carried(squares / total, products.view(d_sparse, d_dense).T / total))
    return found


def twin_rows(
    logits: Float[Tensor, "b s vocab"],
    input_ids: Int[Tensor, "b s"],
    attention_mask: Int[Tensor, "b s"] | None,
    draws: Draws,
) -> Twin:
    """Replace one token per row by another that the model, whose `logits` these are, might have put there.

    The place is drawn evenly among the real tokens but the first, the token by the model's own probability.
    """
    counted, draws = counted_tokens(input_ids, attention_mask), draws.double()
    rows = torch.arange(len(input_ids))
    nth = (draws[:, 0] * counted.sum(1)).long()
    reached = counted & (counted.long().cumsum(1) > nth[:, None])
    place = reached.long().argmax(1)  # 0 where a row has a single token; `reached` is then empty
    p = logits[rows, (place - 1).clamp(min=0)].double().softmax(-1).cpu().clamp(min=1e-30)
    p[rows, input_ids[rows, place]] = 0
    cumulated = p.cumsum(-1)
    token = torch.searchsorted(cumulated, draws[:, 1:] * cumulated[:, -1:], right=True)[:, 0]
    twin = input_ids.clone()
    there = reached.any(1)
    twin[rows[there], place[there]] = token[there].to(twin)
    return Twin(twin, reached)


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
    in_dense = torch.einsum("bsd,dc,bsc->bc", to_dense.to(weight), weight, dz.to(weight))
    in_sparse = (to_sparse.to(weight) * dz.to(weight)).sum(1)
    best, channel = (in_dense.clamp(min=0) * in_sparse.clamp(min=0)).max(1)
    return channel, best > 0
