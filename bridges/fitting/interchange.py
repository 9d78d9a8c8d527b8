"""The interchange loss: when one token changes, one sparse channel should carry the change of the dense stream.

Where sparse channels vary together, many decoders reconstruct the dense stream equally well, and least squares spreads
the meaning of a token over all of them. Of those decoders this loss prefers one whose single channels have more effect
on the dense model. It says nothing about what the sparse model does with its channels.

A row x is perturbed: one token is replaced by another that the dense model might have put there. From that token on the
streams differ by dh in the dense model and by dz in the sparse one. Each pair of rows has a channel c: the one whose
change alone does most, to first order, to bring both models from their output on x to their output on the perturbed
row. Summed over tokens and over the pairs that have such a channel,

    interchange[i] = sum |dh - W_dec[:, c] dz_c|^2 / sum |dh|^2

No task is involved. Interchanging activations between inputs as a training signal: Geiger et al. 2022
(arXiv 2112.00826).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from bridges.models.residual import Trace
from bridges.objective.hybrid import SIDES, ModelPair, residuals_at, trace_pair
from bridges.objective.normalizers import predicting_tokens
from bridges.objective.sums import Reduce, Sums, no_reduce
from bridges.ops.kl import kl_divergence

Draws = Float[Tensor, "_ 2"]
"""Two random numbers in [0, 1) per row: which token is replaced, and by which. Batches may differ in size."""
PerturbationBatch = tuple[Tensor, Tensor | None, Draws]
"""input_ids and attention_mask, [batch, seq] each, and the draws."""


class QuadraticTerm(NamedTuple):
    """The interchange loss of one site, which is quadratic in the decoder's weight: no batch is needed any more."""

    squares: Float[Tensor, " d_sparse"]
    """Per channel the sum of dz_c^2 over the tokens of the pairs assigned to this channel, divided by sum |dh|^2."""
    products: Float[Tensor, "d_dense d_sparse"]
    """The same sum of dh dz_c."""

    def loss(self, weight: Float[Tensor, "d_dense d_sparse"]) -> Float[Tensor, ""]:
        """The part of the dense change that the pairs' channels do not carry; 1 for a decoder of zeros."""
        squares, products = self.squares.to(weight), self.products.to(weight)
        return 1 + (weight.square() * squares).sum() - 2 * (weight * products).sum()


def terms_to_tensors(sites: Sequence[str], terms: Sequence[QuadraticTerm]) -> dict[str, Tensor]:
    """The terms of all sites as named tensors, for a checkpoint."""
    return {
        f"{site}.{name}": tensor
        for site, term in zip(sites, terms, strict=True)
        for name, tensor in term._asdict().items()
    }


def terms_from_tensors(
    sites: Sequence[str], tensors: Mapping[str, Tensor], device: torch.device
) -> list[QuadraticTerm]:
    """The inverse of `terms_to_tensors`."""
    return [QuadraticTerm(*(tensors[f"{site}.{name}"].to(device) for name in QuadraticTerm._fields)) for site in sites]


@torch.no_grad()
def gather_quadratic_terms(
    pair: ModelPair, batches: Iterable[PerturbationBatch], sites: Sequence[int], reduce: Reduce = no_reduce
) -> list[QuadraticTerm]:
    """The interchange loss at some bridged sites, given by index, from the batches of all processes.

    Channels are chosen with the decoders as they are, so these must be fitted before. Raises FloatingPointError,
    naming the site, if a figure is not finite.
    """
    decoders = [pair.bridge_set[i].decoder_weight for i in sites]
    sums = [_TermSums.zeros(decoder) for decoder in decoders]
    for input_ids, attention_mask, draws in batches:
        original = trace_pair(pair, input_ids, attention_mask, differentiable=True)
        _refuse_not_finite(original.dense.logits, attention_mask, "the dense model's logits")
        perturbed = perturb_rows(original.dense.logits, input_ids, attention_mask, draws)
        changed = trace_pair(pair, perturbed.input_ids, attention_mask)
        gradients = {
            side: output_gradients(original.side(side), changed.side(side).logits, perturbed.after) for side in SIDES
        }
        for total, decoder, i in zip(sums, decoders, sites, strict=True):
            after = perturbed.after.to(decoder.device)[..., None]
            streams = zip(residuals_at(pair, original, i), residuals_at(pair, changed, i), strict=True)
            dh, dz = (torch.where(after, new.double() - old.double(), 0) for old, new in streams)
            to_output = [
                torch.where(after, gradients[side][pair.site(side, i)].to(after.device).double(), 0) for side in SIDES
            ]
            for tensor in (dh, dz, *to_output):
                _refuse_not_finite(tensor, None, f"a stream or its gradient at site {pair.bridge_set.sites[i]}")
            total.add(*choose_channels(decoder, dz, *to_output), dh, dz)
    return [total.reduced(reduce).term(decoder.dtype) for total, decoder in zip(sums, decoders, strict=True)]


@dataclass
class _TermSums(Sums):
    """The sums of one site's `QuadraticTerm`, in float64."""

    squares: Float[Tensor, " d_sparse"]
    products: Float[Tensor, "d_sparse d_dense"]
    total: Float[Tensor, ""]
    """sum |dh|^2."""

    @classmethod
    def zeros(cls, decoder: Float[Tensor, "d_dense d_sparse"]) -> _TermSums:
        products = torch.zeros_like(decoder.T, dtype=torch.float64, memory_format=torch.contiguous_format)
        return cls(products.new_zeros(len(products)), products, products.new_zeros(()))

    def add(self, channel: Tensor, found: Tensor, dh: Tensor, dz: Tensor) -> None:
        """Add the pairs of rows that have a channel: those where `found` is true."""
        channel, dh, dz = channel[found], dh[found], dz[found]
        dz_c = dz.gather(2, channel[:, None, None].expand(-1, dz.shape[1], 1))
        self.squares.index_add_(0, channel, dz_c.square().sum((1, 2)))
        self.products.index_add_(0, channel, (dz_c * dh).sum(1))
        self.total += dh.square().sum()

    def term(self, dtype: torch.dtype) -> QuadraticTerm:
        """Both sums, divided by sum |dh|^2."""
        total = torch.where(self.total > 0, self.total, torch.inf)  # no pair has a channel: both are then zero
        return QuadraticTerm((self.squares / total).to(dtype), (self.products / total).to(dtype).T.contiguous())


def _refuse_not_finite(tensor: Tensor, mask: Tensor | None, what: str) -> None:
    real = tensor if mask is None else tensor[mask.bool().to(tensor.device)]
    if not real.isfinite().all():
        raise FloatingPointError(
            f"interchange loss: {what} is not finite; look for weights that are NaN, or for a dtype that overflows"
        )


class PerturbedRows(NamedTuple):
    """A batch with one token of every row replaced."""

    input_ids: Int[Tensor, "b s"]
    after: Bool[Tensor, "b s"]
    """True at the replaced token and at the real ones after it."""


def perturb_rows(
    logits: Float[Tensor, "b s vocab"],
    input_ids: Int[Tensor, "b s"],
    attention_mask: Int[Tensor, "b s"] | None,
    draws: Draws,
) -> PerturbedRows:
    """Replace one token per row by another that the model, whose `logits` these are, might have put there.

    The position is drawn evenly among the real tokens that follow a real one, the token by the model's own probability.
    """
    draws, rows = draws.double(), torch.arange(len(input_ids))
    predicted = F.pad(predicting_tokens(input_ids, attention_mask), (1, 0))
    nth = (draws[:, 0] * predicted.sum(1)).long()
    position = (predicted & (predicted.long().cumsum(1) == nth[:, None] + 1)).long().argmax(1)
    possible = predicted.any(1)  # in other rows nothing can be replaced, and position is 0
    real = torch.ones_like(predicted) if attention_mask is None else attention_mask.bool()
    after = real & possible[:, None] & (torch.arange(predicted.shape[1]) >= position[:, None])
    p = logits[rows, (position - 1).clamp(min=0)].double().softmax(-1).cpu().clamp(min=1e-30)
    p[rows, input_ids[rows, position]] = 0
    cumulative = p.cumsum(-1)
    token = torch.searchsorted(cumulative, draws[:, 1:] * cumulative[:, -1:], right=True)[:, 0]
    perturbed = input_ids.clone()
    perturbed[rows[possible], position[possible]] = token[possible].to(perturbed)
    return PerturbedRows(perturbed, after)


def output_gradients(
    trace: Trace, logits: Float[Tensor, "b s vocab"], after: Bool[Tensor, "b s"]
) -> list[Float[Tensor, "b s d_model"]]:
    """At every site of a differentiable trace, the direction in which its stream moves the model's output to `logits`.

    It is the gradient of -KL(softmax(logits) || the trace's own output), summed over the tokens of `after`.
    """
    after = after.to(logits.device)
    with torch.enable_grad():
        return list(torch.autograd.grad(-kl_divergence(logits[after], trace.logits[after]), trace.residuals))


def choose_channels(
    weight: Float[Tensor, "d_dense d_sparse"],
    dz: Float[Tensor, "b s d_sparse"],
    dense_gradient: Float[Tensor, "b s d_dense"],
    sparse_gradient: Float[Tensor, "b s d_sparse"],
) -> tuple[Int[Tensor, " b"], Bool[Tensor, " b"]]:
    """Per row the channel of largest product of first-order effects on both models, and whether it helps both."""
    with torch.autocast(dz.device.type, enabled=False):
        in_dense = torch.einsum("bsd,dc,bsc->bc", dense_gradient, weight.to(dense_gradient), dz)
    in_sparse = (sparse_gradient * dz).sum(1)
    best, channel = (in_dense.clamp(min=0) * in_sparse.clamp(min=0)).max(1)
    return channel, best > 0
