"""Which edits a search over many sites makes, and what it compares, on a tiny random pair in float64."""

import math

import pytest
import torch

from bridges.channels import candidates as module
from bridges.channels import search as search_module
from bridges.channels.attribution import Location
from bridges.channels.candidates import spread
from bridges.channels.find import find
from bridges.channels.prompts import Channels
from bridges.channels.reference_text import sample_text
from bridges.channels.search import ChannelSet, Search, SearchOptions
from bridges.io.progress import Bar

PLACES = [Location(i, "read") for i in range(4)]
EFFECTS = {
    at: torch.tensor(values)
    for at, values in zip(PLACES, ([9.0, 8, 7, 6], [1.0, 0.5, 0, -1], [5.0, 4, 3, 2], [0.1, 0.2, 0, 0]), strict=True)
}
CANDIDATES = {at: effects.argsort(descending=True).tolist() for at, effects in EFFECTS.items()}


@pytest.fixture(scope="module")
def text(pair):
    return sample_text(pair, seed=3)


@pytest.mark.parametrize("most", [16, 20])
def test_all_candidates_are_tried_where_they_are_few(most):
    assert spread(CANDIDATES, EFFECTS, most) == [(at, c) for at in PLACES for c in CANDIDATES[at]]


def test_of_many_half_are_the_largest_of_all_and_the_others_the_first_of_each_place():
    """Six: the three largest, 9, 8 and 7, are at one place; then the best of each other place, 5, 1 and 0.2."""
    chosen = spread(CANDIDATES, EFFECTS, 6)
    assert chosen == [(PLACES[0], 0), (PLACES[0], 1), (PLACES[0], 2), (PLACES[2], 0), (PLACES[1], 0), (PLACES[3], 1)]
    assert (
        spread(CANDIDATES, EFFECTS, 8)[-2:] == [(PLACES[3], 1), (PLACES[2], 2)]
        or len(spread(CANDIDATES, EFFECTS, 8)) == 8
    )
    assert len(set(spread(CANDIDATES, EFFECTS, 11))) == 11


@pytest.mark.parametrize("by", ["dense", "both"])
def test_over_many_places_a_search_makes_a_limited_number_of_edits(pair, prompts, text, monkeypatch, by):
    """Ten places here; as if two were many, 16 edits of eight candidates each, at every place one or more."""
    for one in (module, search_module):
        monkeypatch.setattr(one, "LOCATIONS_TRIED_IN_FULL", 2)
    options = SearchOptions(by=by, budget=math.inf, candidates=8)
    search = Search(pair, prompts, text, options)
    assert len(search.single_edits) == 16
    found = find(pair, prompts, text, options)
    assert len(found.ranking) == 16
    if by == "dense":
        assert len({(one.site, one.at) for one in found.ranking}) >= 8
        assert {(one.site, (one.channel,), one.at) for one in found.ranking} == set(map(tuple, search.single_edits))
        assert found.best in search.single_edits


def test_sets_over_many_places_grow_where_most_is_predicted_and_elsewhere_only_if_nothing_is_found_there(
    pair, prompts, text, monkeypatch
):
    monkeypatch.setattr(search_module, "LOCATIONS_TRIED_IN_FULL", 2)
    monkeypatch.setattr(search_module, "PREFERRED_LOCATIONS", 1)
    search = Search(pair, prompts, text, SearchOptions(2, budget=math.inf, candidates=8))
    likely, others = search.likely_locations()
    together = {at: sum(sorted(effects.tolist())[-2:]) for at, effects in search.effects.items()}
    assert [*likely, *others] == sorted(together, key=together.get, reverse=True) and len(likely) == 2
    grown = []
    a_set = ChannelSet(Channels("final", (1,), "read"), 0.5, 0.5, 0.0, 0.0)
    monkeypatch.setattr(search, "grow_at", lambda at: grown.append(at) or ([a_set] if at == others[1] else []))
    assert search.grow_sets(Bar()) == [[a_set]]
    assert set(grown[:2]) == set(likely) and grown[2:] == others[:2]


def test_only_places_that_may_win_are_compared_with_random_directions(pair, prompts, text, monkeypatch):
    """A margin is never over the score, so that lower scores than the largest margin cannot win.

    Random directions that do nothing leave every margin its whole score: then the first one compared wins.
    """
    search = Search(pair, prompts, text, SearchOptions(budget=math.inf, candidates=8))
    compared = []

    def against_nothing(chosen):
        compared.append(chosen)
        return 0.0

    monkeypatch.setattr(search, "p_target_random", against_nothing)
    found = search.best_single(Bar())
    assert set(compared) == {max(search.single_edits, key=search.score)} and len(found) == 1


def test_only_channels_that_beat_the_others_are_ablated(pair, prompts, text, monkeypatch):
    search = Search(pair, prompts, text, SearchOptions(budget=10.0, candidates=8))
    ablated, compared, ablation_kl, margin = [], [], search.text.ablation_kl, search.margin
    monkeypatch.setattr(search.text, "ablation_kl", lambda one: ablated.append(one) or ablation_kl(one))
    monkeypatch.setattr(search, "margin", lambda one: compared.append(one) or margin(one))
    search.best_single(Bar())
    margins = [margin(one) for one in compared]
    assert ablated == [one for i, one in enumerate(compared) if margins[i] > max(margins[:i], default=-math.inf)]
    assert len(ablated) < len(compared)


@pytest.mark.parametrize("by", ["dense", "both"])
def test_the_winner_is_that_of_a_comparison_at_every_place(pair, prompts, text, by):
    """As if every place's likeliest channel were compared with random directions."""
    search = Search(pair, prompts, text, SearchOptions(by=by, budget=math.inf, candidates=8))
    best = max(sets[0].margin(by) for sets in search.best_single(Bar()))
    places = {}
    for one in sorted(search.helpful(search.single_edits), key=search.score):
        places[one.site, one.at] = one
    everywhere = [search.compare_with_random(one) for one in places.values()]
    assert len(everywhere) > 4 and best == max(one.margin(by) for one in everywhere)
