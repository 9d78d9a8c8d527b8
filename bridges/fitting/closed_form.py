"""The closed form for every bridge of a set, in one pass over the tokens or as few as memory allows.

The ridge regression itself is in `bridges.fitting.ridge`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.bridge import Bridge
from bridges.fitting.interchange import PerturbationBatch, QuadraticTerm, gather_quadratic_terms
from bridges.fitting.ridge import Affine, Penalty, gather
from bridges.models.residual import Batch
from bridges.objective.hybrid import SIDES, ModelPair, residuals_at, trace_pair
from bridges.objective.normalizers import counted_tokens
from bridges.objective.sums import Reduce, Sums, no_reduce


@torch.no_grad()
def solve_bridges(
    pair: ModelPair,
    batches: Sequence[Batch],
    ridge: float,
    memory_bytes: float,
    reduce: Reduce = no_reduce,
    perturbations: Sequence[PerturbationBatch] = (),
    interchange_weight: float = 0.0,
) -> list[QuadraticTerm]:
    """Set every bridge to its least-squares solution (method, section 3); the encoder is fitted without AbsTopK.

    `batches` are this process's part of the tokens, which may be none. They are run once per group of sites whose
    moments fit into `memory_bytes`. Where `interchange_weight` is over 0, the decoders found choose the channels of the
    interchange loss on the `perturbations`, and are then solved again for NMSE + interchange_weight * interchange.
    Returns that loss for every site, or nothing where it is off. Raises FloatingPointError, naming the site, if a
    stream is not finite.
    """
    terms: list[QuadraticTerm] = []
    for sites in site_groups(pair, memory_bytes):
        moments = gather(_chunks(pair, batches, sites), reduce)
        for i, found in zip(sites, moments, strict=True):
            if not all(tensor.isfinite().all() for tensor in found.tensors()):
                raise FloatingPointError(
                    f"closed form: a residual stream at site {pair.bridge_set.sites[i]} is not finite; "
                    "look for weights that are NaN, or for a dtype that overflows"
                )
            _set_encoder(pair.bridge_set[i], found.solve(ridge))
            _set_decoder(pair.bridge_set[i], found.solve(ridge, reverse=True))
        if interchange_weight > 0:
            terms += gather_quadratic_terms(pair, perturbations, sites, reduce)
            for i, found in zip(sites, moments, strict=True):
                penalty = Penalty(terms[i].squares, terms[i].products, interchange_weight)
                _set_decoder(pair.bridge_set[i], found.solve(ridge, reverse=True, penalty=penalty))
    return terms


def site_groups(pair: ModelPair, memory_bytes: float) -> Iterator[list[int]]:
    """The bridged sites in order, in groups whose moments fit into the memory, at least one site in each."""
    d_dense, d_sparse = pair.dense.d_model, pair.sparse.d_model
    bytes_per_site = 8 * (d_dense**2 + d_sparse**2 + d_dense * d_sparse)
    size = max(1, int(memory_bytes // bytes_per_site))
    for start in range(0, len(pair.bridge_set), size):
        yield list(range(start, min(start + size, len(pair.bridge_set))))


@dataclass
class _ReadScaleSums(Sums):
    rms_dense: Float[Tensor, " n_sites"]
    """Per-token RMS of C(h), summed over counted tokens."""
    rms_sparse: Float[Tensor, " n_sites"]
    tokens: Float[Tensor, ""]


@torch.no_grad()
def measure_read_scales(pair: ModelPair, batches: Sequence[Batch], reduce: Reduce = no_reduce) -> None:
    """Set rms_dense, rms_sparse (R, the mean RMS) and gain_sparse, the sparse norm's gain, of every bridge.

    R is the mean over counted tokens of the per-token RMS of C(h); 1 where the read has no norm before it (method,
    section 4). `batches` are this process's part of the tokens, which may be none.
    """
    n = len(pair.bridge_set)
    norms = {side: [pair.model(side).norm(pair.site(side, i)) for i in range(n)] for side in SIDES}
    sums = _ReadScaleSums(*(torch.zeros(shape, dtype=torch.float64) for shape in ((n,), (n,), ())))
    for batch in batches:
        for i, streams in enumerate(_counted_streams(pair, batch, range(n))):
            for side, rms, h in zip(SIDES, (sums.rms_dense, sums.rms_sparse), streams, strict=True):
                h = h.double()
                h = h - h.mean(-1, keepdim=True) if norms[side][i].centred else h
                rms[i] += h.square().mean(-1).sqrt().sum().cpu()
        sums.tokens += int(counted_tokens(*batch).sum())
    sums = sums.reduced(reduce)
    for i, bridge in enumerate(pair.bridge_set):
        bridge.rms_dense.fill_(sums.rms_dense[i] / sums.tokens if norms["dense"][i].present else 1.0)
        bridge.rms_sparse.fill_(sums.rms_sparse[i] / sums.tokens if norms["sparse"][i].present else 1.0)
        bridge.gain_sparse.copy_(norms["sparse"][i].gain)


def _chunks(pair: ModelPair, batches: Sequence[Batch], sites: Sequence[int]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The counted streams of every batch; without batches, one chunk of no tokens, so that shapes are known."""
    for batch in batches:
        yield _counted_streams(pair, batch, sites)
    if not batches:
        weights = [pair.bridge_set[i].encoder_weight for i in sites]
        yield [(w.new_zeros(0, pair.dense.d_model), w.new_zeros(0, pair.sparse.d_model)) for w in weights]


def _counted_streams(pair: ModelPair, batch: Batch, sites: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """The (dense, sparse) streams [n, d_model] at some bridged sites, over counted tokens."""
    traces = trace_pair(pair, *batch)
    counted = counted_tokens(*batch)
    streams = [residuals_at(pair, traces, i) for i in sites]
    return [(d[counted.to(d.device)], s[counted.to(s.device)]) for d, s in streams]


def _set_encoder(bridge: Bridge, solution: Affine) -> None:
    bridge.encoder_weight.copy_(solution.weight)
    bridge.encoder_bias.copy_(solution.bias)


def _set_decoder(bridge: Bridge, solution: Affine) -> None:
    bridge.decoder_weight.copy_(solution.weight)
    bridge.decoder_bias.copy_(solution.bias)
