"""The closed form for every bridge of a set, in one pass over the tokens or as few as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from bridges.bridge import Bridge
from bridges.fitting.interchange import Carried, PairBatch, gather_carried
from bridges.fitting.ridge import Affine, Moments, gather
from bridges.models.residual import Batch
from bridges.objective.hybrid import ModelPair, residuals_at, trace_pair
from bridges.objective.normalizers import Reduce, counted_tokens, no_reduce


@torch.no_grad()
def solve_bridges(
    pair: ModelPair,
    batches: Callable[[], Iterable[Batch]],
    ridge: float,
    memory_bytes: float,
    reduce: Reduce = no_reduce,
    first: bool = True,
    pairs: Callable[[], Iterable[PairBatch]] | None = None,
    carried_weight: float = 0.0,
) -> list[Carried]:
    """Set every bridge to its least-squares solution; the encoder's is the one before AbsTopK, a warm start.

    `batches()` starts a pass over this process's tokens. One pass is made per group of sites whose moments fit into
    `memory_bytes`. With `pairs`, decoders are solved again with the interchange loss at `carried_weight` against the
    NMSE; what it asks of every site is returned.
    """
    carried: list[Carried] = []
    for group in site_groups(pair, memory_bytes):
        moments = gather(_chunks(pair, batches(), group), reduce, first)
        for site, found in zip(group, moments, strict=True):
            if not all(tensor.isfinite().all() for tensor in found.tensors()):
                raise FloatingPointError(
                    f"closed form: a residual stream at site {pair.bridge_set.sites[site]} is not finite; "
                    "look for weights that are NaN, or for a dtype that overflows"
                )
            set_closed_form(pair.bridge_set[site], found, ridge)
        if pairs is not None:
            asked = gather_carried(pair, pairs(), group, reduce)
            for site, found, one in zip(group, moments, asked, strict=True):
                bridge = pair.bridge_set[site]
                solution = found.solve(ridge, reverse=True, carried=one, carried_weight=carried_weight)
                _set(bridge.decoder_weight, bridge.decoder_bias, solution)
            carried += asked
    return carried


def set_closed_form(bridge: Bridge, moments: Moments, ridge: float) -> None:
    """Both directions from the same moments of (dense, sparse) streams."""
    encoder, decoder = moments.solve(ridge), moments.solve(ridge, reverse=True)
    _set(bridge.encoder_weight, bridge.encoder_bias, encoder)
    _set(bridge.decoder_weight, bridge.decoder_bias, decoder)


def site_groups(pair: ModelPair, memory_bytes: float) -> Iterator[list[int]]:
    """The bridged sites in runs whose moments fit into the memory, at least one at a time."""
    d_dense, d_sparse = pair.dense.d_model, pair.sparse.d_model
    bytes_per_site = 8 * (d_dense**2 + d_sparse**2 + d_dense * d_sparse)
    size = max(1, int(memory_bytes // bytes_per_site))
    for start in range(0, len(pair.bridge_set), size):
        yield list(range(start, min(start + size, len(pair.bridge_set))))


@torch.no_grad()
def measure_read_scales(pair: ModelPair, batches: Iterable[Batch], reduce: Reduce = no_reduce) -> None:
    """Set what gives reads their units (method, section 4): R of both sides of every bridge, the sparse norm's gain.

    R is the mean over tokens of the per-token RMS of C(h), 1 where no norm stands before the read.
    """
    n = len(pair.bridge_set)
    norms = [[pair.model(side).norm(pair.site(side, i)) for i in range(n)] for side in ("dense", "sparse")]
    sums = torch.zeros(2 * n + 1, dtype=torch.float64)
    for batch in batches:
        for i, streams in enumerate(_counted(pair, batch, range(n))):
            for side, h in enumerate(streams):
                h = h.double()
                h = h - h.mean(-1, keepdim=True) if norms[side][i].centred else h
                sums[side * n + i] += h.square().mean(-1).sqrt().sum().cpu()
            sums[-1] += len(streams[0]) if i == 0 else 0
    sums = reduce(sums)
    for i, bridge in enumerate(pair.bridge_set):
        for buffer, side in ((bridge.rms_dense, 0), (bridge.rms_sparse, 1)):
            buffer.fill_(sums[side * n + i] / sums[-1] if norms[side][i].present else 1.0)
        bridge.gain_sparse.copy_(norms[1][i].gain)


def _chunks(pair: ModelPair, batches: Iterable[Batch], sites: Sequence[int]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The counted (dense, sparse) streams of every batch; one chunk without tokens for a process without batches."""
    empty = True
    for batch in batches:
        empty = False
        yield _counted(pair, batch, sites)
    if empty:
        weights = [pair.bridge_set[site].encoder_weight for site in sites]
        yield [
            (weight.new_zeros(0, pair.dense.d_model), weight.new_zeros(0, pair.sparse.d_model)) for weight in weights
        ]


def _counted(pair: ModelPair, batch: Batch, sites: Iterable[int]) -> list[tuple[Tensor, Tensor]]:
    traces = trace_pair(pair, *batch)
    counted = counted_tokens(*batch)
    streams = [residuals_at(pair, traces, site) for site in sites]
    return [(d[counted.to(d.device)], s[counted.to(s.device)]) for d, s in streams]


def _set(weight: Tensor, bias: Tensor, solution: Affine) -> None:
    weight.copy_(solution.weight)
    bias.copy_(solution.bias)
