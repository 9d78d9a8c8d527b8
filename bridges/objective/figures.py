"""The sums behind the held-out figures of a bridge set (method, section 2), which add up over batches and processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from bridges.objective.head import logits_of, position_chunks
from bridges.objective.hybrid import (
    ALL_POSITIONS,
    common_logits,
    next_tokens,
    run_path_to_final,
    single_side_path,
    single_switch_path,
)
from bridges.objective.normalizers import counted_tokens
from bridges.objective.pair import SIDES, ModelPair, Side, Traces, residuals_at
from bridges.objective.sums import Reduce, Sums
from bridges.ops.abs_topk import abs_topk
from bridges.ops.kl import row_divergence

PASSES = tuple(
    f"{name}{control}" for name in ("dense_to_sparse", "sparse_to_dense") for control in ("", "_mean_ablation")
)
"""The passes that are measured at every site: both hybrids, and both tails under mean ablation."""

_ZERO = 1e-12
"""A variance below this part of the mean square is rounding: the stream does not vary."""


@dataclass
class SpreadSums(Sums):
    """Per site, sums over tokens of a stream's deviation from a fixed point: its mean and variance about it."""

    tokens: Float[Tensor, " n_sites"]
    deviation: Float[Tensor, "n_sites d"]
    squares: Float[Tensor, " n_sites"]

    @classmethod
    def zeros(cls, n_sites: int, width: int) -> SpreadSums:
        """The sums over no token."""
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in ((n_sites,), (n_sites, width), (n_sites,))))

    def add(self, site: int, deviations: Float[Tensor, "n d"]) -> None:
        """Add the deviations of some tokens at one site."""
        deviations = deviations.double()
        self.tokens[site] += len(deviations)
        self.deviation[site] += deviations.sum(0).cpu()
        self.squares[site] += deviations.square().sum().cpu()

    def mean(self) -> Float[Tensor, "n_sites d"]:
        """The mean deviation."""
        return self.deviation / self.tokens.clamp(min=1)[:, None]

    def squares_about(self, point: Float[Tensor, "n_sites d"]) -> Float[Tensor, " n_sites"]:
        """sum |deviation - point|^2."""
        return self.squares - 2 * (self.deviation * point).sum(1) + self.tokens * point.square().sum(1)

    def variance(self) -> Float[Tensor, " n_sites"]:
        """sum |deviation - its mean|^2, exactly 0 where the stream does not vary."""
        variance = self.squares - self.tokens * self.mean().square().sum(1)
        return torch.where(variance > _ZERO * self.squares, variance, torch.where(variance.isnan(), variance, 0.0))


@dataclass
class ErrorSums(Sums):
    """Per site, squared errors summed over tokens and channels."""

    encode: Float[Tensor, " n_sites"]
    floor: Float[Tensor, " n_sites"]
    """Of AbsTopK(h_sparse) from h_sparse."""
    decode: Float[Tensor, " n_sites"]
    encode_massive: Float[Tensor, " n_sites"]
    """Over the massive tokens, which the others leave out."""
    decode_massive: Float[Tensor, " n_sites"]


class Reconstruction:
    """Every sum over streams: errors, and the spread of what they are held against.

    Streams are measured from their medians at the site, so that float64 sums of squares lose no digits to a mean.
    """

    def __init__(self, pair: ModelPair):
        n = len(pair.bridge_set)
        self.pair = pair
        self.errors = _zeros(ErrorSums, n)
        widths: dict[Side, int] = {"dense": pair.dense.d_model, "sparse": pair.sparse.d_model}
        self.usual: dict[Side, SpreadSums] = {side: SpreadSums.zeros(n, width) for side, width in widths.items()}
        """Over the counted tokens."""
        self.massive: dict[Side, SpreadSums] = {side: SpreadSums.zeros(n, width) for side, width in widths.items()}
        """Over the massive tokens, which are few, if any."""
        self.decoded = SpreadSums.zeros(n, widths["dense"])
        """Of the decoder's output, from the dense stream's median."""

    def add(self, traces: Traces) -> None:
        """Add one batch."""
        counted = counted_tokens(traces.dense.context.input_ids, traces.dense.context.attention_mask)
        for i in range(len(self.pair.bridge_set)):
            self._add_site(i, *(h[counted.to(h.device)] for h in residuals_at(self.pair, traces, i)))

    def _add_site(self, i: int, h_dense: Tensor, h_sparse: Tensor) -> None:
        bridge, errors = self.pair.bridge_set[i], self.errors
        usual = bridge.is_usual(h_dense, h_sparse)
        h_usual = h_dense[usual], h_sparse[usual]
        encoded, decoded = self._add_tokens(i, *h_usual, self.usual, errors.encode, errors.decode)
        if len(encoded) < len(h_dense):
            massive = h_dense[~usual], h_sparse[~usual]
            self._add_tokens(i, *massive, self.massive, errors.encode_massive, errors.decode_massive)
        kept = h_usual[1].to(encoded)
        errors.floor[i] += (abs_topk(kept, bridge.k) - kept).square().sum().double().cpu()
        self.decoded.add(i, decoded.double() - bridge.median_dense.double())

    def _add_tokens(
        self,
        i: int,
        h_dense: Tensor,
        h_sparse: Tensor,
        spread: dict[Side, SpreadSums],
        encode: Float[Tensor, " n_sites"],
        decode: Float[Tensor, " n_sites"],
    ) -> tuple[Tensor, Tensor]:
        """Add some tokens' spread and errors at one site; returns what both maps make of them."""
        bridge = self.pair.bridge_set[i]
        spread["dense"].add(i, h_dense.double() - bridge.median_dense.double())
        spread["sparse"].add(i, h_sparse.double() - bridge.median_sparse.double())
        wide = torch.promote_types(bridge.decoder_weight.dtype, torch.float32)
        encoded, decoded = bridge.encode(h_dense).to(wide), bridge.decode(h_sparse).to(wide)
        encode[i] += (encoded - h_sparse.to(wide)).square().sum(-1).double().sum().cpu()
        decode[i] += (decoded - h_dense.to(wide)).square().sum(-1).double().sum().cpu()
        return encoded, decoded

    def reduced(self, reduce: Reduce) -> Reconstruction:
        """The sums over all processes."""
        total = Reconstruction(self.pair)
        total.errors, total.decoded = self.errors.reduced(reduce), self.decoded.reduced(reduce)
        for name in ("usual", "massive"):
            setattr(total, name, {side: sums.reduced(reduce) for side, sums in getattr(self, name).items()})
        return total

    def means(self) -> dict[Side, Float[Tensor, "n_sites d"]]:
        """Each site's mean stream over counted tokens."""
        bridges = list(self.pair.bridge_set)
        medians: dict[Side, Tensor] = {
            "dense": torch.stack([bridge.median_dense.double().cpu() for bridge in bridges]),
            "sparse": torch.stack([bridge.median_sparse.double().cpu() for bridge in bridges]),
        }
        return {side: medians[side] + self.usual[side].mean() for side in SIDES}


@dataclass
class PassSums(Sums):
    """Sums over the rows of one pass per site; K is a row's summed KL, n its real tokens. In nats."""

    kl: Float[Tensor, " n_sites"]
    kl_squared: Float[Tensor, " n_sites"]
    """Of K^2."""
    kl_times_tokens: Float[Tensor, " n_sites"]
    """Of K n."""
    ce: Float[Tensor, " n_sites"]
    """Next-token cross-entropy over the tokens of `predicting_tokens`."""


@dataclass
class RowSums(Sums):
    """Sums over rows that every pass shares; entries are one number each."""

    rows: Float[Tensor, ""]
    tokens: Float[Tensor, ""]
    tokens_squared: Float[Tensor, ""]
    predictions: Float[Tensor, ""]
    dense_ce: Float[Tensor, ""]
    sparse_ce: Float[Tensor, ""]
    kl_sparse_alone: Float[Tensor, ""]


class Hybrids:
    """The KL from the dense model and the cross-entropy of every pass at every site."""

    def __init__(
        self, pair: ModelPair, means: dict[Side, Float[Tensor, "n_sites d"]], paths: Sequence[Sequence[Side]] = ()
    ):
        """`means`: each site's mean stream, for mean ablation. `paths`: further passes."""
        self.pair, self.means, self.paths = pair, means, paths
        self.path_kl = torch.zeros(len(paths), dtype=torch.float64)
        """Summed over tokens, nats."""
        self.passes = {name: _zeros(PassSums, len(pair.bridge_set)) for name in PASSES}
        self.rows = RowSums(*(torch.zeros((), dtype=torch.float64) for _ in fields(RowSums)))

    def add(self, traces: Traces) -> Iterator[int]:
        """Add one batch; yields after every site and path, so that a progress bar can follow."""
        pair, n = self.pair, len(self.pair.bridge_set)
        batch = _Batch(pair, traces)
        for i in range(n):
            for name in PASSES:
                batch.add(self.passes[name], i, *self._to_final(traces, name, i))
            yield i
        for j, path in enumerate(self.paths):
            self.path_kl[j] += batch.figures(path[-1], run_path_to_final(pair, traces, path))[0].sum()
            yield n + j
        batch.add_models(self.rows, run_path_to_final(pair, traces, single_side_path(n, "sparse")))

    def _to_final(self, traces: Traces, name: str, i: int) -> tuple[Side, Float[Tensor, "b s _"]]:
        """The side that a pass ends in, and its stream at `final`."""
        pair = self.pair
        start: Side = "dense" if name.startswith("dense") else "sparse"
        side: Side = "sparse" if start == "dense" else "dense"
        model, trace = pair.model(side), traces.side(side)
        if not name.endswith("_mean_ablation"):
            return side, run_path_to_final(pair, traces, single_switch_path(len(pair.bridge_set), i, start))
        site = pair.site(side, i)
        stream = trace.residuals[site]
        mean = self.means[side][i].to(stream).expand_as(stream)
        return side, model.run(site, len(model.sites) - 1, mean, trace.context)

    def reduced(self, reduce: Reduce) -> Hybrids:
        """The sums over all processes."""
        total = Hybrids(self.pair, self.means, self.paths)
        total.path_kl = reduce(self.path_kl)
        total.passes = {name: sums.reduced(reduce) for name, sums in self.passes.items()}
        total.rows = self.rows.reduced(reduce)
        return total

    def kl(self, name: str) -> Float[Tensor, " n_sites"]:
        """Mean KL per real token."""
        return self.passes[name].kl / self.rows.tokens

    def ce(self, name: str) -> Float[Tensor, " n_sites"]:
        """Mean cross-entropy per predicted token."""
        return self.passes[name].ce / self.rows.predictions

    def kl_standard_error(self, name: str) -> Float[Tensor, " n_sites"]:
        """The standard error of `kl`, as a ratio of two sums over independent rows; NaN for a single row.

        Tokens of one row are not independent, so rows are what is counted (Cochran 1977, Sampling Techniques, 6.3).
        """
        sums, rows, mean = self.passes[name], self.rows, self.kl(name)
        squares = sums.kl_squared - 2 * mean * sums.kl_times_tokens + mean**2 * rows.tokens_squared
        if rows.rows < 2:
            return torch.full_like(mean, torch.nan)
        return (squares.clamp(min=0) * rows.rows / (rows.rows - 1)).sqrt() / rows.tokens


class _Batch:
    """One batch's tokens, and what every pass on it is held against."""

    def __init__(self, pair: ModelPair, traces: Traces):
        self.pair, self.traces = pair, traces
        ids, mask = traces.dense.context.input_ids, traces.dense.context.attention_mask
        self.real: Bool[Tensor, "b s"] = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.predicting, self.labels = next_tokens(traces)

    def figures(self, side: Side, stream: Float[Tensor, "b s _"]) -> tuple[Float[Tensor, " b"], Float[Tensor, ""]]:
        """Each row's KL from the dense model, and the cross-entropy, both summed over tokens; float64 on the CPU.

        `stream` is that side's at `final`. The logits of a few tokens exist at a time.
        """
        model = self.pair.model(side)
        context = self.traces.side(side).context
        parts = [
            self._of(logits_of(model, stream, context, positions), positions)
            for positions in position_chunks(model, stream)
        ]
        kls, ces = zip(*parts, strict=True)
        return torch.stack(kls).sum(0).cpu(), torch.stack(ces).sum().cpu()

    def _of(
        self, logits: Float[Tensor, "b kept vocab"], positions: slice = ALL_POSITIONS
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, ""]]:
        """The `figures` of some positions, on the device of the logits."""
        real, predicting, labels = (
            tensor[:, positions].to(logits.device) for tensor in (self.real, self.predicting, self.labels)
        )
        target = self.traces.dense.logits[:, positions].to(logits.device)
        logits = common_logits(self.traces, logits)[real]
        kl, log_normalizer = row_divergence(target[real], logits)
        of_label = logits.gather(1, rearrange(labels[real], "n -> n 1"))[:, 0]
        ce = (log_normalizer - of_label.to(log_normalizer))[predicting[real]].double().sum()
        per_token = torch.zeros(real.shape, dtype=torch.float64, device=logits.device)
        per_token[real] = kl.double()
        return per_token.sum(1), ce

    def add(self, sums: PassSums, site: int, side: Side, stream: Float[Tensor, "b s _"]) -> None:
        """Add one pass at one site, given by the side that it ends in and its stream at `final`."""
        kl, ce = self.figures(side, stream)
        sums.kl[site] += kl.sum()
        sums.kl_squared[site] += kl.square().sum()
        sums.kl_times_tokens[site] += (kl * self.real.sum(1).cpu()).sum()
        sums.ce[site] += ce

    def add_models(self, sums: RowSums, sparse_stream: Float[Tensor, "b s _"]) -> None:
        """Add the figures of both models by themselves."""
        tokens = self.real.sum(1).double().cpu()
        sums.rows += len(tokens)
        sums.tokens += tokens.sum()
        sums.tokens_squared += tokens.square().sum()
        sums.predictions += self.predicting.sum().cpu()
        sums.dense_ce += self._of(self.traces.dense.logits)[1].cpu()
        kl, ce = self.figures("sparse", sparse_stream)
        sums.sparse_ce += ce
        sums.kl_sparse_alone += kl.sum()


SumsT = TypeVar("SumsT", bound=Sums)


def _zeros(kind: type[SumsT], n_sites: int) -> SumsT:
    return kind(*(torch.zeros(n_sites, dtype=torch.float64) for _ in fields(kind)))
