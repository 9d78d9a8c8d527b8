"""Which tokens are massive: those whose centred norm is many times its median at a site (method, section 3).

A few tokens of a language model have streams a hundred times as long as all others. Six in eight thousand can hold 95 %
of a site's variance, and least squares then fits those six. Left out, nothing is known of their directions; where later
layers attend to them (attention sinks), every prediction of a hybrid pass then suffers. So they are fitted to as well,
shortened to the limit, where that costs the NMSE of all other tokens next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.fitting.ridge import Affine, Moments
from bridges.models.tokens import Batch
from bridges.objective.normalizers import counted_tokens
from bridges.objective.pair import SIDES, ModelPair, Side, residuals_at, trace_pair
from bridges.objective.sums import Reduce, no_reduce

SAMPLED_TOKENS = 2048
"""Tokens that the medians are taken over, at most."""
SAMPLE_BYTES = 2**30
"""Memory for the streams of these tokens, at most."""
MAX_COST = 0.1
"""The most by which fitting to massive tokens may raise the NMSE of all others, as a share of that NMSE."""
MAX_ADDED = 1e-6
"""The NMSE that it may add whatever that NMSE is: where a fit is exact, a share of it is rounding."""


class NormLimit(NamedTuple):
    """Where the massive tokens of one stream begin."""

    median: Float[Tensor, " d"]
    """Each channel's median over tokens; norms are of h - median."""
    limit: float
    """Tokens of a larger norm are massive; infinite where the median norm is 0, and no limit can be told."""


def norm_limit(h: Float[Tensor, "n d"], threshold: float) -> NormLimit:
    """The limit `threshold` times the median over tokens of |h - median|, where the medians are of a stream's channels.

    Medians, not means: up to half of the tokens may be massive without moving the limit much.
    """
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    median = h.T.contiguous().median(1).values
    usual = (h - median).norm(dim=-1).double().median().item()
    return NormLimit(median, threshold * usual if usual > 0 else math.inf)


@torch.no_grad()
def set_norm_limits(
    pair: ModelPair,
    batches: Sequence[Batch],
    threshold: float | None,
    sides: Iterable[Side] = SIDES,
    broadcast: Callable[[Iterable[Tensor]], None] = lambda tensors: None,
) -> None:
    """Set both norm limits of every bridge from the streams of some batches; None leaves out no token.

    The main process's medians are given to all by `broadcast`.
    """
    streams = {side: [] for side in sides} if threshold is None else _sample(pair, batches, sides)
    for i, bridge in enumerate(pair.bridge_set):
        for side in sides:
            median, limit = getattr(bridge, f"median_{side}"), getattr(bridge, f"norm_limit_{side}")
            limit.fill_(math.inf)
            if threshold is not None:
                found = norm_limit(streams[side][i], threshold)
                median.copy_(found.median)
                limit.fill_(found.limit)
            broadcast([median, limit])


def _sample(pair: ModelPair, batches: Sequence[Batch], sides: Iterable[Side]) -> dict[Side, list[Tensor]]:
    """The streams of both sides at every bridged site, over as many tokens as memory allows."""
    n = len(pair.bridge_set)
    bytes_per_token = 4 * n * (pair.dense.d_model + pair.sparse.d_model)
    most = max(1, min(SAMPLED_TOKENS, SAMPLE_BYTES // bytes_per_token))
    parts: dict[Side, list[list[Tensor]]] = {side: [[] for _ in range(n)] for side in sides}
    tokens = 0
    for batch in batches:
        if tokens >= most:
            break
        traces, counted = trace_pair(pair, *batch, logits=()), counted_tokens(*batch)
        for i in range(n):
            for side, h in zip(SIDES, residuals_at(pair, traces, i), strict=True):
                if side in parts:
                    parts[side][i].append(h[counted.to(h.device)][: most - tokens])
        tokens += min(int(counted.sum()), most - tokens)
    return {side: [torch.cat(of_site) for of_site in sites] for side, sites in parts.items()}


class MassiveMoments:
    """The moments of the massive tokens of some sites, each shortened towards the medians until it meets the limit.

    Both streams of a token are shortened by one factor, so a linear relation between them stays what it is.
    """

    def __init__(self, bridge_set: BridgeSet):
        self._bridge_set = bridge_set
        self._moments: dict[int, Moments] = {}

    def add(self, site: int, h_dense: Float[Tensor, "n d_dense"], h_sparse: Float[Tensor, "n d_sparse"]) -> None:
        """Add massive tokens of one site, as they are."""
        if not len(h_dense):
            return
        bridge = self._bridge_set[site]
        factor = 1 / bridge.relative_norm(h_dense, h_sparse).double()[:, None]
        shorter = [
            median + factor * (h.double() - median)
            for h, median in ((h_dense, bridge.median_dense), (h_sparse, bridge.median_sparse))
        ]
        self._at(site).update(*shorter)

    def reduced(self, sites: Sequence[int], reduce: Reduce = no_reduce) -> dict[int, Moments]:
        """The sums over all processes, for those of the sites where any process has met a massive token."""
        device = self._bridge_set[sites[0]].median_dense.device
        present = torch.tensor([float(site in self._moments) for site in sites], dtype=torch.float64, device=device)
        found = {site: self._at(site) for site, here in zip(sites, reduce(present).tolist(), strict=True) if here}
        for moments in found.values():
            moments.reduce(reduce)
        return found

    def _at(self, site: int) -> Moments:
        bridge = self._bridge_set[site]
        return self._moments.setdefault(site, Moments(bridge.median_dense, bridge.median_sparse))


class Fitted(NamedTuple):
    """The solution of a site and direction, and whether massive tokens are among what it is solved from."""

    solution: Affine
    to_massive: bool


def with_massive(
    usual: Moments,
    everything: Moments | None,
    heldout: Moments,
    ridge: float,
    reverse: bool = False,
    freedom: Float[Tensor, " d_in"] | None = None,
) -> Fitted:
    """Solve from `everything`, massive tokens among it, where the usual tokens hardly pay for it, else from `usual`.

    That is where the NMSE of the usual tokens, on the `heldout` rows if there are any, is at most `MAX_COST` above that
    of the solution without massive tokens. A token whose two streams have little to do with each other is so left out.
    `everything` is None where no token is massive; `freedom` is that of `Moments.solve`.
    """
    without = Fitted(usual.solve(ridge, reverse, freedom), False)
    if everything is None:
        return without
    having = Fitted(everything.solve(ridge, reverse, freedom), True)
    judge = heldout if heldout.n >= 2 else usual
    least, nmse = (judge.nmse(one.solution, reverse) for one in (without, having))
    return having if nmse <= (1 + MAX_COST) * least + MAX_ADDED else without
