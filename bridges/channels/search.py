"""Greedy search for sets of channels that flip the dense model's answer, within a KL budget for ablating them.

A set grows by one channel at a time, at one location. Candidates come from first-order predictions
(`bridges.channels.attribution`); what counts is the edit itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Literal, NamedTuple, NoReturn, get_args

from jaxtyping import Float, Int
from torch import Tensor

from bridges.channels.attribution import Effects, Location, predicted_effects, top_channels
from bridges.channels.prompts import (
    Channels,
    Prompts,
    ReferenceText,
    ablated_logits,
    edit_addend,
    p_target,
    p_target_under_edit,
)
from bridges.config import DEFAULT_SEQ_LEN
from bridges.data.sampled import sampled_text
from bridges.objective.hybrid import SIDES, ModelPair, Side
from bridges.ops.kl import kl_divergence
from bridges.steering.delta import edited_logits, random_addends

By = Literal["dense", "both"]
"""Whose answer channels are chosen by: the dense model's, or both models'."""
CANDIDATES = 16
"""Channels per location whose edit is made, those of largest predicted effect."""
MIN_CANDIDATES = 8
MAX_CHANNELS = 8
"""Channels that a set may have."""
BUDGET = 0.04
"""KL that ablating a set may cost the dense model on other text, nats per token."""
MARGIN_TOLERANCE = 0.05
"""How much less margin than the largest set a smaller one may have and still be preferred: every channel more moves
other text."""
PREFERRED_LOCATIONS = 3
"""Locations at which sets of several channels are grown: those whose likeliest channels do most together."""
SEARCH_DIRECTIONS = 5
"""Random directions that a set is compared with while it is chosen."""
SAMPLED_ROWS = 16
"""Rows sampled from the dense model where no text is given."""


class NoChannelsFoundError(ValueError):
    """No candidate raises P(target) within the budget."""


class ChannelSet(NamedTuple):
    """A set of channels and what its counterfactual edit does at strength 1, means over prompts."""

    channels: Channels
    p_target: float
    """Of the dense model."""
    p_target_sparse: float
    """Of the sparse model, edited at the same channels."""
    p_target_random: float
    """Of the dense model under the strongest of a few random directions with the edit's own norm."""
    ablation_kl: float
    """KL of the dense model on other text with the channels ablated, nats per token."""

    def margin(self, by: By) -> float:
        """P(target) beyond that of random directions; by both models, its geometric mean with the sparse model's."""
        beyond = self.p_target - self.p_target_random
        return beyond if by == "dense" else (max(beyond, 0.0) * self.p_target_sparse) ** 0.5


def check_search(most: int, by: str, budget: float = BUDGET, candidates: int = CANDIDATES, name: str = "most") -> None:
    """Raise ValueError for a setting of the search that is out of range; `name` is the caller's word for `most`."""
    if not isinstance(most, Integral) or not 1 <= most <= MAX_CHANNELS:
        raise ValueError(f"{name}={most!r} must be a whole number between 1 and {MAX_CHANNELS}")
    if not isinstance(candidates, Integral) or candidates < MIN_CANDIDATES:
        raise ValueError(f"candidates={candidates!r} must be a whole number, at least {MIN_CANDIDATES}")
    if not isinstance(budget, int | float) or not budget >= 0:
        raise ValueError(f"budget={budget!r} must be 0 nats or more; use inf for no limit")
    if by not in get_args(By):
        raise ValueError(f"by={by!r} must be one of {', '.join(get_args(By))}")


def sample_text(pair: ModelPair, seed: int, for_search: bool = True) -> Int[Tensor, "rows seq"]:
    """Sample reference text from the dense model: other rows for a search than for what is reported of its result."""
    width = min(DEFAULT_SEQ_LEN, pair.dense.context_length or DEFAULT_SEQ_LEN)
    return sampled_text(pair.dense, SAMPLED_ROWS, width, 2 * seed + for_search)


class Search:
    """One search on one task: makes every edit and every ablation once, and remembers its result."""

    def __init__(
        self,
        pair: ModelPair,
        prompts: Prompts,
        text: ReferenceText,
        most: int = 1,
        by: By = "dense",
        budget: float = BUDGET,
        candidates: int = CANDIDATES,
    ):
        self.pair, self.prompts, self.text = pair, prompts, text
        self.most, self.by, self.budget, self.candidates = most, by, budget, candidates
        self.sides: tuple[Side, ...] = ("dense",) if by == "dense" else SIDES
        self.dense_effects = self.effects = predicted_effects(pair, prompts)
        self.candidate_sources = [(self.dense_effects, candidates)]
        if by == "both":
            sparse_effects = predicted_effects(pair, prompts, "sparse")
            self.effects = _effects_on_both(self.dense_effects, sparse_effects)
            # Half the candidates are top-ranked by both models, a few by one model only.
            few = candidates // 8
            self.candidate_sources = [(self.effects, candidates // 2), (self.dense_effects, few), (sparse_effects, few)]
        self._p_target: dict[tuple[Channels, Side], Float[Tensor, " b"]] = {}
        self._ablation_kl: dict[Channels, float] = {}

    def p_target_per_prompt(self, chosen: Channels, side: Side = "dense") -> Float[Tensor, " b"]:
        """P(target) of one model under the counterfactual edit."""
        if (chosen, side) not in self._p_target:
            self._p_target[chosen, side] = p_target_under_edit(self.pair, self.prompts, chosen, side=side)
        return self._p_target[chosen, side]

    def score(self, chosen: Channels) -> float:
        """Mean P(target) of the dense model, or its geometric mean with the sparse model's."""
        return _geometric_mean([self.p_target_per_prompt(chosen, side) for side in self.sides])

    def unedited_score(self) -> float:
        """The score without an edit."""
        traces = self.prompts.traces
        return _geometric_mean([p_target(traces.side(side).logits, self.prompts.pairs) for side in self.sides])

    def ablation_kl(self, chosen: Channels) -> float:
        """KL of the dense model on the text with the channels ablated, nats per token."""
        if chosen not in self._ablation_kl:
            unedited, ablated = self.text.trace.logits, ablated_logits(self.pair, self.text, chosen)
            kl = kl_divergence(unedited.flatten(0, 1), ablated.flatten(0, 1)).item()
            self._ablation_kl[chosen] = kl / unedited[..., 0].numel()
        return self._ablation_kl[chosen]

    def within_budget(self, chosen: Channels) -> bool:
        """Whether ablating the channels keeps within the budget; nothing is run where that is infinite."""
        return self.budget == math.inf or self.ablation_kl(chosen) <= self.budget

    def channels_at(self, location: Location, channels: Sequence[int]) -> Channels:
        """Channels at a location, by the names that users see."""
        return Channels(self.pair.bridge_set.sites[location.bridge], tuple(channels), location.at)

    def candidates_at(self, location: Location) -> list[int]:
        """The channels whose edit is tried at a location."""
        tried = (channel for effects, n in self.candidate_sources for channel in top_channels(effects[location], n))
        return list(dict.fromkeys(tried))

    def grow_sets(self) -> list[list[ChannelSet]]:
        """Grow sets at the locations that score best, at the others only if those give none.

        Returns, per location with any, sets of 1, 2, ... channels. Raises NoChannelsFoundError if no location has one
        that raises P(target) within the budget.
        """
        ranked = self.rank_locations()
        n_first = len(ranked) if self.most == 1 else PREFERRED_LOCATIONS
        for locations in (ranked[:n_first], ranked[n_first:]):
            if grown := [sets for location in locations if (sets := self.grow_at(location))]:
                return grown
        self._refuse()

    def rank_locations(self) -> list[Location]:
        """Locations by the score of their likeliest channels within the budget, edited together."""
        if self.most == 1:  # every location is searched, in any order
            return list(self.effects)

        def joint_score(location: Location) -> float:
            likely: tuple[int, ...] = ()
            for channel in top_channels(self.effects[location], 2 * self.most):
                if len(likely) < self.most and self.within_budget(self.channels_at(location, (*likely, channel))):
                    likely = (*likely, channel)
            return self.score(self.channels_at(location, likely)) if likely else 0.0

        return sorted(self.effects, key=joint_score, reverse=True)

    def grow_at(self, location: Location) -> list[ChannelSet]:
        """Sets of 1, 2, ... channels: each adds the best candidate within the budget, as long as the score grows."""
        sets: list[ChannelSet] = []
        candidates, channels, best = self.candidates_at(location), (), self.unedited_score()
        while len(channels) < self.most:
            larger = [self.channels_at(location, (*channels, c)) for c in candidates if c not in channels]
            scores = {one: score for one in larger if (score := self.score(one)) > best}
            by_score = sorted(scores, key=scores.__getitem__, reverse=True)
            chosen = next((one for one in by_score if self.within_budget(one)), None)
            if chosen is None:
                break
            channels, best = chosen.channels, scores[chosen]
            sets.append(self.compare_with_random(chosen))
        return sets

    def compare_with_random(self, chosen: Channels) -> ChannelSet:
        """The set with what it does, and with what random directions of the same norm do."""
        pair, prompts = self.pair, self.prompts
        site = pair.site("dense", pair.bridge_set.index(chosen.site))
        # Another seed than that of the directions that a sweep reports.
        addends = random_addends(edit_addend(pair, prompts, chosen), SEARCH_DIRECTIONS, seed=0)
        logits = (edited_logits(pair.dense, prompts.traces.dense, site, addend, chosen.at) for addend in addends)
        strongest = max(p_target(one, prompts.pairs).mean().item() for one in logits)
        dense, sparse = (self.p_target_per_prompt(chosen, side).mean().item() for side in SIDES)
        return ChannelSet(chosen, dense, sparse, strongest, self.ablation_kl(chosen))

    def _refuse(self) -> NoReturn:
        """Say why there is no set: what was tried, and what it would take."""
        task, unedited = self.prompts.pairs.task, self.unedited_score()
        tried = [self.channels_at(at, (c,)) for at in self.effects for c in self.candidates_at(at)]
        scores = [self.score(one) for one in tried]
        if all(math.isnan(score) for score in scores):
            raise FloatingPointError(f"task={task!r}: P(target) is NaN under every edit; models or bridges hold NaN")
        helpful = [one for one, score in zip(tried, scores, strict=True) if score > unedited]
        if not helpful:
            raise NoChannelsFoundError(
                f"task={task!r}: none of the {len(tried)} channels tried raises P(target) (by={self.by!r}); "
                f"find_channels tries more with candidates= (now {self.candidates})"
            )
        cheapest = min(map(self.ablation_kl, helpful))
        raise NoChannelsFoundError(
            f"task={task!r}: no channel raises P(target) (by={self.by!r}) within budget={self.budget:g} nats per token "
            f"on other text; the cheapest that raises it costs {cheapest:.3g}; pass a larger budget="
        )


def _geometric_mean(p_per_model: Sequence[Float[Tensor, " b"]]) -> float:
    """Of each model's mean over prompts."""
    return math.prod(p.mean().item() for p in p_per_model) ** (1 / len(p_per_model))


def _effects_on_both(dense: Effects, sparse: Effects) -> Effects:
    """The geometric mean of the effects on both models; 0 where either is negative."""
    return {at: (effect.clamp(min=0) * sparse[at].clamp(min=0)).sqrt() for at, effect in dense.items()}


def smallest_sufficient(grown: Sequence[Sequence[ChannelSet]], by: By) -> list[ChannelSet]:
    """From the location of the set with the largest margin, the sets up to the smallest that comes near that margin."""
    best = max(grown, key=lambda sets: max(one.margin(by) for one in sets))
    margins = [one.margin(by) for one in best]
    size = next(size for size, margin in enumerate(margins, 1) if margin >= max(margins) - MARGIN_TOLERANCE)
    return list(best[:size])
