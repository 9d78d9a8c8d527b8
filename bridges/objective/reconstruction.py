"""The errors of both maps on the streams, and the streams' spread, as sums that add up over batches and processes.

The NMSEs of the held-out figures are their quotients (method, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.objective.normalizers import counted_tokens
from bridges.objective.pair import SIDES, ModelPair, Side, Traces, residuals_at
from bridges.objective.sums import Reduce, Sums, zeros_per_site
from bridges.ops.abs_topk import abs_topk

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
        self.errors = zeros_per_site(ErrorSums, n)
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
