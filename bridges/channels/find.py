"""find_channels(): which channels of the sparse model flip the dense model's answer to a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.channels.attribution import mean_log, top_channels
from bridges.channels.prompts import (
    Channels,
    Prompts,
    ReferenceText,
    check_text,
    frozen_pair,
    p_target,
    resolve_task,
    run_prompts,
    run_reference_text,
)
from bridges.channels.search import (
    BUDGET,
    CANDIDATES,
    By,
    ChannelSet,
    Search,
    check_search,
    sample_text,
    smallest_sufficient,
)
from bridges.models.residual import ResidualModel
from bridges.objective.hybrid import ModelPair
from bridges.steering.delta import EntryPoint
from bridges.tasks.pairs import TaskPairs

CHOSEN_ON = 64
"""Pairs of a task that channels are chosen on; what is reported of them comes from other pairs."""


class RankedChannel(NamedTuple):
    """One channel's counterfactual edit at strength 1: its predicted and its measured effect."""

    site: str
    channel: int
    at: EntryPoint
    predicted: float
    """First-order change of the dense model's mean log P(target), nats."""
    effect: float
    """The change that the edit makes, nats."""
    p_target: float
    """The dense model's mean P(target) under the edit."""


class FoundChannels(NamedTuple):
    """The result of `find_channels`, on the prompts that it chose on."""

    task: str
    ranking: list[RankedChannel]
    """Every single channel whose edit was made, largest P(target) first."""
    agreement: float
    """Spearman's rank correlation of predicted and measured effects over the ranking."""
    sets: list[ChannelSet]
    """Sets of 1, 2, ... channels at one site, each grown from the one before; the last is `best`."""

    @property
    def best(self) -> Channels:
        """The smallest set whose margin over random directions comes near the largest margin."""
        return self.sets[-1].channels


def find_channels(
    dense: nn.Module | ResidualModel | str | Path,
    sparse: nn.Module | ResidualModel | str | Path,
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
    """Find the channels whose counterfactual edit flips the dense model's answer to a task (paper A.4).

    `dense`, `sparse`: model objects, `ResidualModel`s, folders or hub ids. `task`: one of `TASKS`, of which `n` pairs
    are made with `tokenizer` (None: the one saved with the dense model), or `TaskPairs`.

    One backward pass predicts the effect of every channel at every site, at the read and at the residual. The
    `candidates` of largest prediction at each are then edited. Sets grow greedily to at most `most` channels at one
    site: by the dense model's P(target), or with `by="both"` by the geometric mean of both models', which finds
    channels that the sparse model itself decides by. The result is the smallest set that does nearly as much, beyond
    random directions of its norm, as the best. Only sets count that raise P(target) and whose ablation costs the dense
    model at most `budget` nats per token on `text` [rows, seq], token ids that have nothing to do with the task (None:
    sampled from the dense model). Measure the result on other prompts and text, as `sweep` does.

    Raises ValueError if an argument is out of range, the bridges are of other models, or no set keeps within the
    budget.

    >>> import bridges, torch
    >>> pair = bridges.load_pair()
    >>> rows = torch.randint(1024, (64, 32), generator=torch.Generator().manual_seed(0))
    >>> bridge_set = bridges.fit(pair.dense, pair.sparse, rows, steps=0, progress=False, sites=("0.mlp",))
    >>> options = {"n": 8, "text": rows[:4], "tokenizer": pair.tokenizer, "budget": 1.0}
    >>> found = bridges.find_channels(pair.dense, pair.sparse, bridge_set, "for_while", **options)
    >>> found.best.site, len(found.best.channels), len(found.ranking)
    ('0.mlp', 1, 32)
    """
    check_search(most, by, budget, candidates)
    with frozen_pair(dense, sparse, bridge_set, check_models) as pair:
        prompts = run_prompts(pair, resolve_task(task, dense, tokenizer, n, seed))
        rows = sample_text(pair, seed) if text is None else check_text(pair, text)
        return find(pair, prompts, run_reference_text(pair, rows), most, by, budget, candidates)


@torch.no_grad()
def find(
    pair: ModelPair,
    prompts: Prompts,
    text: ReferenceText,
    most: int = 1,
    by: By = "dense",
    budget: float = BUDGET,
    candidates: int = CANDIDATES,
) -> FoundChannels:
    """`find_channels` on prompts and text that both models have run on."""
    from scipy.stats import spearmanr

    search = Search(pair, prompts, text, most, by, budget, candidates)
    ranking = _rank_single_channels(search)
    sets = smallest_sufficient(search.grow_sets(), by)
    agreement: Any = spearmanr([one.predicted for one in ranking], [one.effect for one in ranking])[0]
    return FoundChannels(prompts.pairs.task, ranking, float(agreement), sets)


def _rank_single_channels(search: Search) -> list[RankedChannel]:
    """Edit the candidates of each location one by one; largest P(target) of the dense model first."""
    unedited = mean_log(p_target(search.prompts.traces.dense.logits, search.prompts.pairs))
    ranking = []
    for location, effects in search.dense_effects.items():
        for channel in top_channels(effects, search.candidates):
            chosen = search.channels_at(location, (channel,))
            p = search.p_target_per_prompt(chosen)
            effect = (mean_log(p) - unedited).item()
            predicted = effects[channel].item()
            ranking.append(RankedChannel(chosen.site, channel, chosen.at, predicted, effect, p.mean().item()))
    return sorted(ranking, key=lambda one: one.p_target, reverse=True)
