"""Greedy search for sets of channels that flip the dense model's answer, within a KL budget for ablating them.

A set grows by one channel at a time, at one location. Candidates come from first-order predictions
(`bridges.channels.attribution`); what counts is the edit itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cached_property
from numbers import Integral
from typing import Any, Literal, NamedTuple, NoReturn, get_args

from jaxtyping import Float, Int
from torch import Tensor

from bridges.channels.attribution import Effects, Location, predicted_effects, top_channels
from bridges.channels.candidates import LOCATIONS_TRIED_IN_FULL, effects_on_both, spread, top_of_each
from bridges.channels.prompts import Channels
from bridges.channels.reference_text import ReferenceText
from bridges.channels.runs import Prompts, p_target_under_edits, p_target_under_random, p_target_unedited
from bridges.config import DEFAULT_SEQ_LEN
from bridges.data.prepare import saved_tokenizers
from bridges.data.sampled import SharedTokens, sampled_text
from bridges.io.progress import Bar, progress_bar
from bridges.models.pairing import one_sided_tokens
from bridges.models.residual import context_limit
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


def sample_text(
    pair: ModelPair, seed: int, for_search: bool = True, sources: tuple[Any, Any] | None = None
) -> Int[Tensor, "rows seq"]:
    """Sample reference text from the dense model: other rows for a search than for what is reported of its result.

    `sources`: the dense and the sparse model as the user named them, which says where their tokenizers are saved; the
    text holds no token that only one of these has.
    """
    width = min(DEFAULT_SEQ_LEN, context_limit(pair.dense, pair.sparse) or DEFAULT_SEQ_LEN)
    one_sided = {} if sources is None else one_sided_tokens(saved_tokenizers(sources))
    shared = SharedTokens(min(pair.dense.vocab_size, pair.sparse.vocab_size), frozenset(one_sided))
    return sampled_text(pair.dense, SAMPLED_ROWS, width, 2 * seed + for_search, shared)


class Search:
    """One search on one task: makes every edit and every ablation once, and remembers its result.

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
        self.pair, self.prompts, self.options, self.progress = pair, prompts, options, progress
        self.sides: tuple[Side, ...] = ("dense",) if options.by == "dense" else SIDES
        n_steps = len(self.sides) * len(prompts)
        with progress_bar("predicting effects", n_steps, progress) as bar:
            of_sides = [predicted_effects(pair, prompts, side, bar) for side in self.sides]
        self.effects_on: dict[Side, Effects] = dict(zip(self.sides, of_sides, strict=True))
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
        self.single_edits = self._named(self._first_and(spread(predicted, self.effects, LOCATIONS_TRIED_IN_FULL * n)))
        self.text = ReferenceText(pair, text, self._channels_per_bridge())
        self._p_target: dict[tuple[Channels, Side], Float[Tensor, " n"]] = {}
        self._ablation_kl: dict[Channels, float] = {}
        self._p_random: dict[Channels, float] = {}

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

    def run_edits(self, edits: Sequence[Channels], what: str | None = None, side: Side | None = None) -> None:
        """Make the edits that have not been made, in the models that the search goes by, or in one."""
        for one in self.sides if side is None else (side,):
            new = [chosen for chosen in dict.fromkeys(edits) if (chosen, one) not in self._p_target]
            if new:
                n_steps = len(new) * len(self.prompts)
                with progress_bar(what or f"{len(new)} edits", n_steps, self.progress) as bar:
                    p = p_target_under_edits(self.pair, self.prompts, new, one, bar=bar)
                self._p_target |= {(chosen, one): row for chosen, row in zip(new, p, strict=True)}

    def p_target_per_prompt(self, chosen: Channels, side: Side = "dense") -> Float[Tensor, " n"]:
        """P(target) of one model under the counterfactual edit."""
        self.run_edits([chosen], side=side)
        return self._p_target[chosen, side]

    def score(self, chosen: Channels) -> float:
        """Mean P(target) of the dense model, or its geometric mean with the sparse model's."""
        return _geometric_mean([self.p_target_per_prompt(chosen, side) for side in self.sides])

    @cached_property
    def unedited_score(self) -> float:
        """The score without an edit."""
        return _geometric_mean([p_target_unedited(self.pair, self.prompts, side) for side in self.sides])

    def ablation_kl(self, chosen: Channels) -> float:
        """KL of the dense model on the text with the channels ablated, nats per token."""
        if chosen not in self._ablation_kl:
            self._ablation_kl[chosen] = self.text.ablation_kl(chosen)
        return self._ablation_kl[chosen]

    def within_budget(self, chosen: Channels) -> bool:
        """Whether ablating the channels keeps within the budget; nothing is run where that is infinite."""
        return self.options.budget == math.inf or self.ablation_kl(chosen) <= self.options.budget

    def channels_at(self, location: Location, channels: Sequence[int]) -> Channels:
        """Channels at a location, by the names that users see."""
        return Channels(self.pair.bridge_set.sites[location.bridge], tuple(channels), location.at)

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

    def helpful(self, edits: Sequence[Channels], than: float | None = None) -> list[Channels]:
        """The edits whose score is over another one, by default over that without an edit."""
        self.run_edits(edits)
        return [one for one in edits if self.score(one) > (self.unedited_score if than is None else than)]

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

    def p_target_random(self, chosen: Channels) -> float:
        """P(target) of the dense model under the strongest of a few random directions with the edit's own norm."""
        if chosen not in self._p_random:
            # Another seed than that of the directions that a sweep reports.
            random = p_target_under_random(self.pair, self.prompts, chosen, SEARCH_DIRECTIONS, seed=0)
            self._p_random[chosen] = random.mean(1).max().item()
        return self._p_random[chosen]

    def margin(self, chosen: Channels) -> float:
        """`margin_over_random` of an edit, with the runs of the models that the search goes by."""
        p_target, *sparse = (self.p_target_per_prompt(chosen, side).mean().item() for side in self.sides)
        return margin_over_random(p_target, self.p_target_random(chosen), *sparse)

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


def margin_over_random(p_target: float, p_target_random: float, p_target_sparse: float | None = None) -> float:
    """P(target) of the dense model beyond that of random directions, or its geometric mean with the sparse model's.

    >>> margin_over_random(0.75, 0.25), margin_over_random(0.75, 0.25, 0.5), margin_over_random(0.1, 0.2, 0.5)
    (0.5, 0.5, 0.0)
    """
    beyond = p_target - p_target_random
    return beyond if p_target_sparse is None else (max(beyond, 0.0) * p_target_sparse) ** 0.5


def _geometric_mean(p_per_model: Sequence[Float[Tensor, " b"]]) -> float:
    """Of each model's mean over prompts."""
    return math.prod(p.mean().item() for p in p_per_model) ** (1 / len(p_per_model))


def smallest_sufficient(grown: Sequence[Sequence[ChannelSet]], by: By) -> list[ChannelSet]:
    """From the location of the set with the largest margin, the sets up to the smallest that comes near that margin."""
    best = max(grown, key=lambda sets: max(one.margin(by) for one in sets))
    margins = [one.margin(by) for one in best]
    size = next(size for size, margin in enumerate(margins, 1) if margin >= max(margins) - MARGIN_TOLERANCE)
    return list(best[:size])
