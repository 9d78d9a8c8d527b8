"""Channels that are looked for among a circuit's nodes first, on a tiny random pair in float64."""

import math
from dataclasses import replace

import pytest
import torch
from pairs import tokens, toy_task
from whole import whole_run, written_p_target

from bridges.channels import candidates as candidates_module
from bridges.channels import search as search_module
from bridges.channels.attribution import predicted_effects
from bridges.channels.find import find, find_channels
from bridges.channels.prompts import Channels
from bridges.channels.reference_text import sample_text
from bridges.channels.search import Search, SearchOptions
from bridges.channels.sweep import sweep
from bridges.circuits.circuit import Circuit
from bridges.io.fingerprint import fingerprint

N = 8
"""Candidates by prediction, of the width 12."""


@pytest.fixture(scope="module")
def text(pair):
    return sample_text(pair, seed=3)


@pytest.fixture(scope="module")
def unlikely(pair, prompts):
    """At 1.attn a channel that is no candidate by prediction, at the read and at the residual alike."""
    effects = {at: ranked for at, ranked in predicted_effects(pair, prompts).items() if at.bridge == 2}
    left_out = set.intersection(*(set(ranked.topk(12).indices[N:].tolist()) for ranked in effects.values()))
    return min(left_out)


def circuit_of(pair, channel, task="toy"):
    given = {"0.attn.read": (), "1.attn.read": (channel,), "1.attn.q": (2,)}
    return Circuit(task, given, [], {}, fingerprint=fingerprint(pair.sparse.model))


def find_with(pair, prompts, text, circuit, **options):
    settings = {"candidates": N, "budget": math.inf, "text": text, "check_models": False, **options}
    return find_channels(pair.dense, pair.sparse, pair.bridge_set, prompts.pairs, circuit=circuit, **settings)


def test_a_node_of_low_predicted_effect_is_edited_all_the_same(pair, prompts, text, unlikely):
    without, with_circuit = (find_with(pair, prompts, text, one) for one in (None, circuit_of(pair, unlikely)))
    node = {("1.attn", unlikely, at) for at in ("read", "residual")}

    def edited(found):
        return {(one.site, one.channel, one.at) for one in found.ranking}

    assert not node & edited(without)
    assert edited(with_circuit) == edited(without) | node  # on top of the predicted ones
    run = whole_run(pair, prompts.pairs)
    for one in with_circuit.ranking:
        if (one.site, one.channel) == ("1.attn", unlikely):
            expected = written_p_target(pair, run, Channels("1.attn", (unlikely,), one.at)).mean().item()
            assert one.p_target == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_without_a_circuit_a_search_is_as_it_was_and_says_nothing_of_circuits(pair, prompts, text):
    for most, by in ((1, "dense"), (2, "both")):
        options = SearchOptions(most, by, math.inf, N)
        found, plain = find(pair, prompts, text, options), Search(pair, prompts, text, options)
        assert found.circuit_nodes is None and found.in_circuit is None
        assert not any(plain.first.values())
        assert find(pair, prompts, text, options, circuit_nodes={}) == found._replace(
            circuit_nodes=((),) * len(found.best.channels)
        )


def test_nodes_stand_ahead_of_predicted_candidates_at_their_site_alone(pair, prompts, text, unlikely):
    options = SearchOptions(2, "both", math.inf, N)
    plain = Search(pair, prompts, text, options)
    search = Search(pair, prompts, text, options, first=[("1.attn", unlikely)])
    for at, channels in search.candidates.items():
        here = at.bridge == pair.bridge_set.index("1.attn")
        predicted = [channel for channel in plain.candidates[at] if not here or channel != unlikely]
        assert channels == ([unlikely] if here else []) + predicted
    assert [one.channels for one in search.single_edits[:2]] == [(unlikely,), (unlikely,)]


def test_over_many_places_nodes_are_edited_and_their_places_are_searched(pair, prompts, text, unlikely, monkeypatch):
    for one in (candidates_module, search_module):
        monkeypatch.setattr(one, "LOCATIONS_TRIED_IN_FULL", 2)
    options = SearchOptions(2, "dense", math.inf, N)
    search = Search(pair, prompts, text, options, first=[("1.attn", unlikely)])
    assert len(search.single_edits) == 2 + 2 * N
    likely, others = search.likely_locations()
    assert {pair.bridge_set.sites[at.bridge] for at in likely} == {"1.attn"} and len(others) == 8


def test_each_chosen_channel_is_said_to_be_a_node_or_not(pair, prompts, text):
    """The circuit has the first channel that a search without it chooses, by a read and a write, and no other."""
    plain = find_with(pair, prompts, text, None, most=4)
    site, (first, *rest) = plain.best.site, plain.best.channels
    place = "final.read" if site == "final" else f"{site}.read"
    circuit = replace(circuit_of(pair, 0), nodes={place: (first,), "1.mlp.write": ()})
    found = find_with(pair, prompts, text, circuit, most=4)
    nodes = dict(zip(found.best.channels, found.circuit_nodes, strict=True))
    assert found.best.site != site or nodes[first] == (f"{place}.{first}",)
    assert found.in_circuit == tuple(found.best.site == site and c == first for c in found.best.channels)
    assert found.best == plain.best  # the node was a candidate already
    assert rest or found.in_circuit == (True,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "other"}, r"circuit is of the task 'other', not of task='toy'; pass the circuit of that"),
        ({"fingerprint": "bf16:0 fp16:0"}, "the circuit belongs to another model"),
        ({"nodes": {"1.attn.q": (1,)}}, "has no read or write at a bridged site, which are 0.attn, 0.mlp"),
    ],
)
def test_a_circuit_of_another_task_or_model_or_of_no_stream_channel_is_refused(pair, prompts, text, change, message):
    circuit = replace(circuit_of(pair, 3), **change)
    with pytest.raises(ValueError, match=message):
        find_channels(
            pair.dense, pair.sparse, pair.bridge_set, prompts.pairs, circuit=circuit, text=text, budget=math.inf
        )
    with pytest.raises(ValueError, match=message):
        sweep(pair.dense, pair.sparse, pair.bridge_set, toy_task(rows=66), 1, (1.0,), circuit=circuit, text=text)


def test_what_is_no_circuit_is_refused(pair, prompts, text, unchecked):
    with pytest.raises(ValueError, match=r"circuit='runs/a' must be a bridges\.Circuit"):
        find_with(pair, prompts, text, "runs/a")


@pytest.mark.slow
def test_a_sweep_searches_among_the_nodes_too_and_says_so(pair, unlikely):
    task, models = toy_task(rows=70), (pair.dense, pair.sparse, pair.bridge_set)
    settings = {"text": tokens(), "budget": math.inf, "progress": False}
    circuit = circuit_of(pair, unlikely)
    with torch.no_grad():
        plain, result = (sweep(*models, task, 1, (1.0,), circuit=one, **settings) for one in (None, circuit))
    assert plain.in_circuit is None and "in_circuit" not in plain.to_dict() and "nodes of the circuit" not in str(plain)
    expected = (result.chosen.site == "1.attn" and result.chosen.channels == (unlikely,),)
    assert result.in_circuit == expected and result.to_dict()["in_circuit"] == list(expected)
    assert f"  nodes of the circuit: {sum(expected)} of 1 channels" in str(result).splitlines()
    with pytest.raises(ValueError, match="is for a search; give channels= as a number"):
        sweep(*models, task, result.chosen, (1.0,), circuit=circuit, **settings)
