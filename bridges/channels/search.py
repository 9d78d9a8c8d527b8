"""Greedy search for sets of channels that flip the dense model's answer, within a KL budget for ablating them.

A set grows by one channel at a time, at one location. Candidates come from first-order predictions
(`bridges.channels.attribution`); what counts is the edit itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Integral
from typing import Literal, NamedTuple, NoReturn, get_args

from jaxtyping import Int
from torch import Tensor

from bridges.channels.attribution import Effects, Location, predicted_effects, top_channels
from bridges.channels.candidates import LOCATIONS_TRIED_IN_FULL, effects_on_both, spread, top_of_each
from bridges.channels.measured_edits import MeasuredEdits, margin_over_random
from bridges.channels.prompts import Channels
from bridges.channels.reference_text import ReferenceText
from bridges.channels.runs import Prompts
from bridges.io.progress import Bar, progress_bar
from bridges.objective.pair import SIDES, ModelPair, Side
from bridges.steering.delta import EntryPoint

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
        sparse = () if by == "dense" else (self.p_target_sparse,)
        return margin_over_random(self.p_target, self.p_target_random, *sparse)


class SearchOptions(NamedTuple):
    """How channels are searched for; `find_channels` says what each option does."""

    most: int = 1
    by: By = "dense"
    budget: float = BUDGET
    candidates: int = CANDIDATES

    def checked(self, name: str = "most") -> SearchOptions:
        """The options; ValueError for one that is out of range. `name` is the caller's word for `most`."""
        most, by, budget, candidates = self
        if not isinstance(most, Integral) or not 1 <= most <= MAX_CHANNELS:
            raise ValueError(f"{name}={most!r} must be a whole number between 1 and {MAX_CHANNELS}")
        if not isinstance(candidates, Integral) or candidates < MIN_CANDIDATES:
            raise ValueError(f"candidates={candidates!r} must be a whole number, at least {MIN_CANDIDATES}")
        if not isinstance(budget, int | float) or not budget >= 0:
            raise ValueError(f"budget={budget!r} must be 0 nats or more; use inf for no limit")
        if by not in get_args(By):
            raise ValueError(f"by={by!r} must be one of {', '.join(get_args(By))}")
        return self


def check_search(most: int, by: str, budget: float = BUDGET, name: str = "most") -> None:
    """Raise ValueError for a setting of the search that is out of range; `name` is the caller's word for `most`."""
    SearchOptions(most, by, budget).checked(name)  # pyright: ignore[reportArgumentType]


class Search(MeasuredEdits):
    """One search on one task.

    `first`: channels, as (site, channel), that are candidates at their site whatever is predicted for them. They come
    on top of the predicted ones.
    """

    def __init__(
        self,
        pair: ModelPair,
        prompts: Prompts,
        text: Int[Tensor, "rows seq"],
        options: SearchOptions = SearchOptions(),  # noqa: B008, an immutable tuple
        progress: bool = False,
        first: Collection[tuple[str, int]] = (),
    ):
        self.options = options
        sides: tuple[Side, ...] = ("dense",) if options.by == "dense" else SIDES
        with progress_bar("predicting effects", len(sides) * len(prompts), progress) as bar:
            of_sides = [predicted_effects(pair, prompts, side, bar) for side in sides]
        self.effects_on: dict[Side, Effects] = dict(zip(sides, of_sides, strict=True))
        n = options.candidates
        if options.by == "dense":
            self.effects = self.effects_on["dense"]
            sources = [(self.effects, n)]
        else:
            self.effects = effects_on_both(*of_sides)
            # Half the candidates are top-ranked by both models, a quarter by either model alone: the prediction for one
            # model can be far off where its answer is saturated.
            sources = [(self.effects, n // 2), *((effects, n // 4) for effects in of_sides)]
        predicted = {at: top_of_each(sources, at) for at in self.effects}
        sites = pair.bridge_set.sites
        self.first = {at: [c for site, c in first if site == sites[at.bridge]] for at in self.effects}
        self.candidates = {at: list(dict.fromkeys([*self.first[at], *predicted[at]])) for at in self.effects}
        super().__init__(pair, prompts, ReferenceText(pair, text, self._channels_per_bridge()), sides, progress)
        self.single_edits = self._named(self._first_and(spread(predicted, self.effects, LOCATIONS_TRIED_IN_FULL * n)))

    def _channels_per_bridge(self) -> dict[int, list[int]]:
        """The channels that an ablation may ask for."""
        per_bridge: dict[int, dict[int, None]] = {}
        for location, channels in self.candidates.items():
            likely = top_channels(self.effects[location], 2 * self.options.most)
            per_bridge.setdefault(location.bridge, {}).update(dict.fromkeys([*channels, *likely]))
        return {bridge: list(channels) for bridge, channels in per_bridge.items()}

    def _named(self, edits: Sequence[tuple[Location, int]]) -> list[Channels]:
        return [self.channels_at(location, (channel,)) for location, channel in edits]

    def _first_and(self, edits: Sequence[tuple[Location, int]]) -> list[tuple[Location, int]]:
        first = [(at, channel) for at, channels in self.first.items() for channel in channels]
        return list(dict.fromkeys([*first, *edits]))

    def dense_edits(self) -> list[tuple[Channels, float]]:
        """The single channels of largest predicted effect on the dense model, with the prediction; `first` ahead."""
        n, effects = self.options.candidates, self.effects_on["dense"]
        edits = spread({at: top_channels(effects[at], n) for at in effects}, effects, LOCATIONS_TRIED_IN_FULL * n)
        return [
            (self.channels_at(at, (channel,)), effects[at][channel].item()) for at, channel in self._first_and(edits)
        ]

    def within_budget(self, chosen: Channels) -> bool:
        """Whether ablating the channels keeps within the budget; nothing is run where that is infinite."""
        return self.options.budget == math.inf or self.ablation_kl(chosen) <= self.options.budget

    def find_sets(self, single: bool = False) -> list[list[ChannelSet]]:
        """Sets of 1, 2, ... channels at the locations worth comparing; with `single` of one channel only.

        Raises NoChannelsFoundError if no location has one that raises P(target) within the budget.
        """
        self.run_edits(self.single_edits, f"{len(self.single_edits)} edits of one channel")
        with progress_bar("comparing channels, within the budget", None, self.progress) as bar:
            grown = self.best_single(bar) if single or self.options.most == 1 else self.grow_sets(bar)
        if not grown:
            self._refuse()
        return grown

    def best_single(self, bar: Bar) -> list[list[ChannelSet]]:
        """The likeliest channel of each location, where its margin beats those before it and it keeps to the budget.

        Where it beats them and does not keep to the budget, the location's next one counts. A margin is never over the
        score, so that the search ends at the first channel whose score is under the largest margin so far. Random
        directions come before the ablation, which takes longer and matters only for one that beats the others.
        """
        found: list[Channels] = []
        done: set[tuple[str, EntryPoint]] = set()
        most = -math.inf
        for chosen in sorted(self.helpful(self.single_edits), key=self.score, reverse=True):
            if self.score(chosen) < most:
                break
            bar.advance(note=f"{chosen.site}: {self.score(chosen):.3f}")
            location = (chosen.site, chosen.at)
            if location in done:
                continue
            margin = self.margin(chosen)
            if margin <= most:
                done.add(location)
            elif self.within_budget(chosen):
                done.add(location)
                found.append(chosen)
                most = margin
        return [[self.compare_with_random(chosen)] for chosen in found]

    def grow_sets(self, bar: Bar) -> list[list[ChannelSet]]:
        """Grow sets at the locations that score best, at the others only if those give none."""
        likely, others = self.likely_locations()
        ranked = self.rank_locations(likely)
        groups = [ranked[:PREFERRED_LOCATIONS], ranked[PREFERRED_LOCATIONS:], *([one] for one in others)]
        for locations in groups:
            grown = []
            for location in locations:
                grown.append(self.grow_at(location))
                bar.advance(note=self.pair.bridge_set.sites[location.bridge])
            if grown := [sets for sets in grown if sets]:
                return grown
        return []

    def likely_locations(self) -> tuple[list[Location], list[Location]]:
        """The locations whose likeliest channels are predicted to do most together, and the others in that order.

        All are likely where there are no more than `LOCATIONS_TRIED_IN_FULL`; else those of the
        channels that come first are ahead.
        """
        n, most = LOCATIONS_TRIED_IN_FULL, self.options.most
        if len(self.effects) <= n:
            return list(self.effects), []
        together = {at: effects.topk(most).values.sum().item() for at, effects in self.effects.items()}
        ranked = sorted(self.effects, key=lambda at: (not self.first[at], -together[at]))
        return ranked[:n], ranked[n:]

    def rank_locations(self, locations: Sequence[Location]) -> list[Location]:
        """Locations by the score of their likeliest channels within the budget, edited together.

        Where channels come first, those alone and the likeliest of all are tried, and the better score counts.
        """
        n = 2 * self.options.most
        together: dict[Location, list[Channels]] = {}
        for at in locations:
            first = sorted(self.first[at], key=lambda channel, at=at: -self.effects[at][channel].item())[:n]
            together[at] = [*self._likeliest(at, first), *self._likeliest(at, top_channels(self.effects[at], n))]
        edits = [one for sets in together.values() for one in sets]
        self.run_edits(edits, "likeliest channels of each site, together")
        scores = {at: max(map(self.score, sets), default=0.0) for at, sets in together.items()}
        return sorted(locations, key=scores.__getitem__, reverse=True)

    def _likeliest(self, location: Location, channels: Sequence[int]) -> list[Channels]:
        """One set of the first of these channels, as many as it may have within the budget; none if none keeps it."""
        likely: tuple[int, ...] = ()
        for channel in channels:
            if len(likely) < self.options.most and self.within_budget(self.channels_at(location, (*likely, channel))):
                likely = (*likely, channel)
        return [self.channels_at(location, likely)] if likely else []

    def grow_at(self, location: Location) -> list[ChannelSet]:
        """Sets of 1, 2, ... channels: each adds the best candidate within the budget, as long as the score grows."""
        sets: list[ChannelSet] = []
        channels, best = (), self.unedited_score
        while len(channels) < self.options.most:
            larger = [
                self.channels_at(location, (*channels, c)) for c in self.candidates[location] if c not in channels
            ]
            by_score = sorted(self.helpful(larger, best), key=self.score, reverse=True)
            chosen = next((one for one in by_score if self.within_budget(one)), None)
            if chosen is None:
                break
            channels, best = chosen.channels, self.score(chosen)
            sets.append(self.compare_with_random(chosen))
        return sets

    def compare_with_random(self, chosen: Channels) -> ChannelSet:
        """The set with what it does, and with what random directions of the same norm do."""
        dense, sparse = (self.p_target_per_prompt(chosen, side).mean().item() for side in SIDES)
        return ChannelSet(chosen, dense, sparse, self.p_target_random(chosen), self.ablation_kl(chosen))

    def _refuse(self) -> NoReturn:
        """Say why there is no set: what was tried, and what it would take."""
        task, (by, budget) = self.prompts.pairs.task, (self.options.by, self.options.budget)
        tried = self.single_edits
        if all(math.isnan(self.score(one)) for one in tried):
            raise FloatingPointError(f"task={task!r}: P(target) is NaN under every edit; models or bridges hold NaN")
        helpful = self.helpful(tried)
        if not helpful:
            raise NoChannelsFoundError(
                f"task={task!r}: none of the {len(tried)} channels tried raises P(target) (by={by!r}); "
                f"find_channels tries more with candidates= (now {self.options.candidates})"
            )
        cheapest = min(map(self.ablation_kl, helpful))
        raise NoChannelsFoundError(
            f"task={task!r}: no channel raises P(target) (by={by!r}) within budget={budget:g} nats per token "
            f"on other text; the cheapest that raises it costs {cheapest:.3g}; pass a larger budget="
        )


def smallest_sufficient(grown: Sequence[Sequence[ChannelSet]], by: By) -> list[ChannelSet]:
    """From the location of the set with the largest margin, the sets up to the smallest that comes near that margin."""
    best = max(grown, key=lambda sets: max(one.margin(by) for one in sets))
    margins = [one.margin(by) for one in best]
    size = next(size for size, margin in enumerate(margins, 1) if margin >= max(margins) - MARGIN_TOLERANCE)
    return list(best[:size])
