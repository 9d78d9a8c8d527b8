"""find_channels(): which channel of the sparse model turns the dense model's answer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from scipy.stats import spearmanr
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.channels.prompts import (
    Channels,
    Prompts,
    Text,
    check_text,
    edited,
    frozen_pair,
    p_target,
    pairs_of,
    prompts_of,
    text_of,
)
from bridges.channels.search import (
    BUDGET,
    CANDIDATES,
    By,
    Grown,
    Search,
    check_search,
    largest,
    log_p,
    predicted_effects,
    sampled,
)
from bridges.models.residual import ResidualModel
from bridges.objective.hybrid import ModelPair
from bridges.steering.delta import EntryPoint
from bridges.tasks.pairs import TaskPairs

CHOSEN_ON = 64
"""Prompts that channels are chosen on, other ones than those reported."""
SLACK = 0.05
"""How much less than the largest margin a set may have and still be kept for being smaller: a smaller edit moves less
else."""


class RankedChannel(NamedTuple):
    """One channel's counterfactual edit at strength 1: what was predicted of it, and what it did."""

    site: str
    channel: int
    at: EntryPoint
    predicted: float
    """First-order change of the dense model's mean log P(target), nats."""
    effect: float
    """The change that the edit made, nats."""
    p_target: float
    """The dense model's mean P(target) under the edit."""


class FoundChannels(NamedTuple):
    """What `find_channels` found on its prompts."""

    task: str
    ranking: list[RankedChannel]
    """Every single channel whose edit was done, largest P(target) first."""
    agreement: float
    """Spearman's rank correlation of prediction and effect over the ranking."""
    sets: list[Grown]
    """Sets of 1, 2, ... channels at one site, each grown from the one before; the last is the one to use."""

    @property
    def best(self) -> Channels:
        """The last set: the smallest of those whose margin comes near the largest."""
        return self.sets[-1].channels


def find_channels(
    dense: nn.Module | ResidualModel,
    sparse: nn.Module | ResidualModel,
    bridge_set: BridgeSet,
    task: str | TaskPairs,
    n: int = CHOSEN_ON,
    *,
    most: int = 1,
    by: By = "dense",
    budget: float = BUDGET,
    candidates: int = CANDIDATES,
    text: Int[Tensor, "rows seq"] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    check_models: bool = True,
) -> FoundChannels:
    """Rank channels by what their counterfactual edit does to the dense model's answer on `n` pairs of a task.

    One backward pass predicts the effect of every channel at every site, at the read and at the residual: dz times the
    decoder's column times the gradient where the edit enters. The `candidates` of largest prediction are then edited.
    Sets grow greedily, to at most `most` channels at one site: by the dense model's P(target), or (`by="both"`) by the
    geometric mean of both models', which finds channels that the sparse model itself decides by. At the site where a
    set does most beyond the strongest of a few random directions of its norm, the smallest set that does nearly as much
    is kept. Only sets count that raise P(target) and whose turning off costs the dense model at most `budget` nats per
    token on `text`, token rows that have nothing to do with the task (None: sampled from the dense model); a warning
    tells where there are none. Report on other prompts and text than these.
    """
    check_search(most, by, budget, candidates)
    with frozen_pair(dense, sparse, bridge_set, check_models) as pair:
        prompts = prompts_of(pair, pairs_of(task, dense, tokenizer, n, seed))
        elsewhere = text_of(pair, sampled(pair, seed) if text is None else check_text(pair, text))
        return find(pair, prompts, elsewhere, most, by, budget, candidates)


@torch.no_grad()
def find(
    pair: ModelPair,
    prompts: Prompts,
    text: Text,
    most: int = 1,
    by: By = "dense",
    budget: float = BUDGET,
    candidates: int = CANDIDATES,
) -> FoundChannels:
    """`find_channels` on prompts and text that were run."""
    before = log_p(p_target(prompts.traces.dense.logits, prompts.pairs))
    predicted = predicted_effects(pair, prompts)
    ranking = []
    for (i, at), effects in predicted.items():
        site = pair.bridge_set.sites[i]
        for channel in largest(effects, candidates):
            p = edited(pair, prompts, Channels(site, (channel,), at))
            effect = (log_p(p) - before).item()
            ranking.append(RankedChannel(site, channel, at, effects[channel].item(), effect, p.mean().item()))
    ranking.sort(key=lambda one: one.p_target, reverse=True)
    agreement: Any = spearmanr([one.predicted for one in ranking], [one.effect for one in ranking])[0]
    search = Search(pair, prompts, text, by, candidates, predicted)
    search.known |= {(Channels(one.site, (one.channel,), one.at), "dense"): one.p_target for one in ranking}
    grown = search.grown(most, budget)
    best = max(grown, key=lambda sets: max(one.margin(by) for one in sets))
    margins = [one.margin(by) for one in best]
    size = next(size for size, margin in enumerate(margins, 1) if margin >= max(margins) - SLACK)
    return FoundChannels(prompts.pairs.task, ranking, float(agreement), best[:size])
