"""The closed form for every bridge of a set, in one pass over the tokens or as few as memory allows.

The ridge regression itself is in `bridges.fitting.ridge`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.bridge import Bridge
from bridges.fitting.massive import MassiveMoments, with_massive
from bridges.fitting.ridge import Affine, Moments, Standardization, gather
from bridges.models.tokens import Batch
from bridges.objective.normalizers import counted_tokens
from bridges.objective.pair import SIDES, ModelPair, residuals_at, trace_pair
from bridges.objective.sums import Reduce, Sums, no_reduce

DEFAULT_RIDGE = 1e-4
"""The penalty where there are no rows to choose it on."""


@torch.no_grad()
def solve_bridges(
    pair: ModelPair,
    batches: Sequence[Batch],
    ridge: float | Literal["auto"],
    memory_bytes: float,
    reduce: Reduce = no_reduce,
    *,
    selection: Sequence[Batch] = (),
    read_scales: ReadScales | None = None,
    decoder_freedom: Sequence[Float[Tensor, " d_sparse"]] | None = None,
    advance: Callable[[], Any] = lambda: None,
) -> ClosedForm:
    """Set every bridge to its least-squares solution (method, section 3); the encoder is fitted without AbsTopK.

    `batches` are this process's part of the tokens, which may be none. They are run once per group of sites whose
    moments fit into `memory_bytes`. The `selection`, this process's part of other rows, judges whether massive tokens
    are fitted to; with `ridge="auto"` the penalty of every site and direction is chosen on it too. `read_scales` are
    measured in the same pass. `decoder_freedom`, one per bridge, is that of `Moments.solve` for decoders. `advance` is
    called after every batch, and after every site that is solved.

    Raises FloatingPointError, naming the site, if a stream is not finite.
    """
    found = ClosedForm([], [], [])
    for sites in site_groups(pair, memory_bytes):
        massive_tokens = MassiveMoments(pair.bridge_set)
        moments = gather(_chunks(pair, batches, sites, advance, read_scales, massive_tokens), reduce)
        massive = massive_tokens.reduced(sites, reduce)
        heldout = gather(_chunks(pair, selection, sites, advance), reduce)
        _refuse_not_finite(pair, sites, moments)
        _refuse_not_finite(pair, sites, heldout, " on the training rows set aside")
        for i, one, judge in zip(sites, moments, heldout, strict=True):
            freedoms = (None, None if decoder_freedom is None else decoder_freedom[i])
            ridges = _ridges(one, judge, freedoms[1]) if ridge == "auto" else (ridge, ridge)
            everything = one + massive[i] if i in massive else None
            encoder, decoder = (
                with_massive(one, everything, judge, ridges[reverse], bool(reverse), freedoms[reverse])
                for reverse in (0, 1)
            )
            _set_encoder(pair.bridge_set[i], encoder.solution)
            _set_decoder(pair.bridge_set[i], decoder.solution)
            found.ridges.append(ridges)
            found.fitted_to_massive.append((encoder.to_massive, decoder.to_massive))
            found.standardizations.append(one.standardization())
            advance()
    return found


class ClosedForm(NamedTuple):
    """What `solve_bridges` has found besides the bridges' weights, one entry per bridge."""

    ridges: list[tuple[float, float]]
    """The ridge penalties of encoder and decoder."""
    fitted_to_massive: list[tuple[bool, bool]]
    """Whether encoder and decoder are fitted to the site's massive tokens too, shortened (`with_massive`)."""
    standardizations: list[tuple[Standardization, Standardization]]
    """Mean and standard deviation of every channel of the dense and of the sparse stream."""


def _refuse_not_finite(pair: ModelPair, sites: Sequence[int], moments: Sequence[Moments], where: str = "") -> None:
    for i, one in zip(sites, moments, strict=True):
        if not all(tensor.isfinite().all() for tensor in one.tensors()):
            raise FloatingPointError(
                f"closed form: a residual stream at site {pair.bridge_set.sites[i]} is not finite{where}; "
                "look for weights that are NaN, for tokens that make a model overflow, or for a dtype that overflows"
            )


def _ridges(
    moments: Moments, heldout: Moments, decoder_freedom: Float[Tensor, " d_sparse"] | None
) -> tuple[float, float]:
    """The penalties of encoder and decoder."""
    if not heldout.n:
        return DEFAULT_RIDGE, DEFAULT_RIDGE
    return moments.choose_ridge(heldout), moments.choose_ridge(heldout, True, decoder_freedom)


@torch.no_grad()
def standardize(
    pair: ModelPair,
    batches: Sequence[Batch],
    memory_bytes: float,
    reduce: Reduce = no_reduce,
    advance: Callable[[], Any] = lambda: None,
) -> list[tuple[Standardization, Standardization]]:
    """Mean and standard deviation of every channel of both streams, per bridge; as `solve_bridges` finds them.

    `advance` is called after every batch, once for each group of sites that memory holds.
    """
    return [
        moments.standardization()
        for sites in site_groups(pair, memory_bytes)
        for moments in gather(_chunks(pair, batches, sites, advance), reduce)
    ]


def site_groups(pair: ModelPair, memory_bytes: float) -> Iterator[list[int]]:
    """The bridged sites in order, in groups whose moments fit into the memory, at least one site in each."""
    size = max(1, int(memory_bytes // bytes_per_site(pair)))
    for start in range(0, len(pair.bridge_set), size):
        yield list(range(start, min(start + size, len(pair.bridge_set))))


def bytes_per_site(pair: ModelPair) -> int:
    """Memory for the moments of a site: of its usual tokens, of massive ones, and of rows that judge the solution."""
    d_dense, d_sparse = pair.dense.d_model, pair.sparse.d_model
    return 3 * 8 * (d_dense**2 + d_sparse**2 + d_dense * d_sparse)


@dataclass
class _ReadScaleSums(Sums):
    rms_dense: Float[Tensor, " n_sites"]
    """Per-token RMS of C(h), summed over counted tokens."""
    rms_sparse: Float[Tensor, " n_sites"]
    tokens: Float[Tensor, " n_sites"]


class ReadScales:
    """Measures rms_dense, rms_sparse (R, the mean RMS) and gain_sparse, the sparse norm's gain, of every bridge.

    R is the mean over counted tokens of the per-token RMS of C(h); 1 where the read has no norm before it (method,
    section 4).
    """

    def __init__(self, pair: ModelPair):
        n = len(pair.bridge_set)
        self.pair = pair
        self.norms = {side: [pair.model(side).norm(pair.site(side, i)) for i in range(n)] for side in SIDES}
        self.sums = _ReadScaleSums(*(torch.zeros(n, dtype=torch.float64) for _ in range(3)))

    def add(self, bridge: int, h_dense: Float[Tensor, "n d_dense"], h_sparse: Float[Tensor, "n d_sparse"]) -> None:
        """Add counted tokens of one bridged site."""
        sums = (self.sums.rms_dense, self.sums.rms_sparse)
        for side, rms, h in zip(SIDES, sums, (h_dense, h_sparse), strict=True):
            h = h.double()
            h = h - h.mean(-1, keepdim=True) if self.norms[side][bridge].centred else h
            rms[bridge] += h.square().mean(-1).sqrt().sum().cpu()
        self.sums.tokens[bridge] += len(h_dense)

    @torch.no_grad()
    def store(self, reduce: Reduce = no_reduce) -> None:
        """Set the bridges' figures to those of the tokens that all processes have added."""
        sums = self.sums.reduced(reduce)
        for i, bridge in enumerate(self.pair.bridge_set):
            dense, sparse = (self.norms[side][i] for side in SIDES)
            bridge.rms_dense.fill_(sums.rms_dense[i] / sums.tokens[i] if dense.present else 1.0)
            bridge.rms_sparse.fill_(sums.rms_sparse[i] / sums.tokens[i] if sparse.present else 1.0)
            bridge.gain_sparse.copy_(sparse.gain)


@torch.no_grad()
def measure_read_scales(
    pair: ModelPair, batches: Sequence[Batch], reduce: Reduce = no_reduce, advance: Callable[[], Any] = lambda: None
) -> None:
    """`ReadScales` of `batches`, this process's part of the tokens, which may be none."""
    scales = ReadScales(pair)
    for batch in batches:
        for i, streams in enumerate(_counted_streams(pair, batch, range(len(pair.bridge_set)))):
            scales.add(i, *streams.usual)
        advance()
    scales.store(reduce)


def _chunks(
    pair: ModelPair,
    batches: Sequence[Batch],
    sites: Sequence[int],
    advance: Callable[[], Any],
    read_scales: ReadScales | None = None,
    massive: MassiveMoments | None = None,
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """The usual tokens of every batch; without batches, one chunk of no tokens, so that shapes are known."""

    def measured(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        for i, streams in zip(sites, _counted_streams(pair, batch, sites), strict=True):
            if read_scales is not None:
                read_scales.add(i, *streams.usual)
            if massive is not None:
                massive.add(i, *streams.massive)
            yield streams.usual

    for batch in batches:
        yield measured(batch)
        advance()
    if not batches:
        weights = [pair.bridge_set[i].encoder_weight for i in sites]
        yield iter([(w.new_zeros(0, pair.dense.d_model), w.new_zeros(0, pair.sparse.d_model)) for w in weights])


class _Streams(NamedTuple):
    """The dense and the sparse stream of one site, [n, d_model] each, over a batch's counted tokens."""

    usual: tuple[Tensor, Tensor]
    massive: tuple[Tensor, Tensor]
    """Of the tokens that are massive at this site, which no mean, scale or NMSE counts."""


def _counted_streams(pair: ModelPair, batch: Batch, sites: Sequence[int]) -> Iterator[_Streams]:
    """The streams of some bridged sites, one site after the other."""
    traces = trace_pair(pair, *batch, logits=())
    for i in sites:
        h_dense, h_sparse = residuals_at(pair, traces, i)
        counted = counted_tokens(*batch).to(h_dense.device)
        h_dense, h_sparse = h_dense[counted], h_sparse[counted]
        usual = pair.bridge_set[i].is_usual(h_dense, h_sparse)
        yield _Streams((h_dense[usual], h_sparse[usual]), (h_dense[~usual], h_sparse[~usual]))


def _set_encoder(bridge: Bridge, solution: Affine) -> None:
    bridge.encoder_weight.copy_(solution.weight)
    bridge.encoder_bias.copy_(solution.bias)


def _set_decoder(bridge: Bridge, solution: Affine) -> None:
    bridge.decoder_weight.copy_(solution.weight)
    bridge.decoder_bias.copy_(solution.bias)
