"""Which tokens are massive: those whose centred norm is many times its median at a site (method, section 3).

A few tokens of a language model have streams a hundred times as long as all others. Six in eight thousand can hold 95 %
of a site's variance, and least squares then fits those six.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.models.residual import Batch
from bridges.objective.hybrid import SIDES, ModelPair, Side, residuals_at, trace_pair
from bridges.objective.normalizers import counted_tokens

SAMPLED_TOKENS = 2048
"""Tokens that the medians are taken over, at most."""
SAMPLE_BYTES = 2**30
"""Memory for the streams of these tokens, at most."""


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
        traces, counted = trace_pair(pair, *batch, with_logits=False), counted_tokens(*batch)
        for i in range(n):
            for side, h in zip(SIDES, residuals_at(pair, traces, i), strict=True):
                if side in parts:
                    parts[side][i].append(h[counted.to(h.device)][: most - tokens])
        tokens += min(int(counted.sum()), most - tokens)
    return {side: [torch.cat(of_site) for of_site in sites] for side, sites in parts.items()}
