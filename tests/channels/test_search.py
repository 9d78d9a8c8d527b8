"""How sets of channels grow and what they may cost, on a tiny random pair in float64."""

import math
from itertools import product

import pytest
import torch
from pairs import gpt2, join, kl_of_turning_off, sparse_model, toy_task, with_units
from whole import whole_run, written_p, written_p_target

from bridges.channels.attribution import predicted_effects
from bridges.channels.find import find, find_channels
from bridges.channels.prompts import Channels
from bridges.channels.reference_text import ReferenceText, sample_text
from bridges.channels.runs import Prompts
from bridges.channels.search import ChannelSet, NoChannelsFoundError, SearchOptions, smallest_sufficient

ALL = 12
"""The width of the sparse model: with as many candidates, every channel is tried."""


@pytest.fixture(scope="module")
def text(pair):
    return sample_text(pair, seed=3)


@pytest.fixture(scope="module")
def run(pair, prompts):
    return whole_run(pair, prompts.pairs)


@pytest.fixture(scope="module")
def unedited(run):
    return written_p(run.traces.dense.logits, run.pairs.targets).mean()


@pytest.fixture(scope="module")
def helpful_costs(pair, run, unedited, text):
    """Ablation KL of every single channel whose edit raises P(target) of the dense model, ascending."""
    costs = []
    sites, entry_points = pair.bridge_set.sites, ("read", "residual")
    for site, at, channel in product(sites, entry_points, range(ALL)):
        chosen = Channels(site, (channel,), at)
        if written_p_target(pair, run, chosen).mean() > unedited:
            costs.append(kl_of_turning_off(pair, text, chosen))
    return sorted(costs)


@pytest.mark.slow
def test_without_text_rows_are_sampled_from_the_dense_model(pair, text):
    assert text.shape == (16, 12)  # as long as the model's context
    assert torch.equal(text, sample_text(pair, 3))
    assert not torch.equal(text, sample_text(pair, 4))
    models = pair.dense.model, pair.sparse.model, pair.bridge_set
    without, given, other = (
        find_channels(*models, toy_task(), candidates=8, seed=3, text=rows, budget=math.inf)
        for rows in (None, sample_text(pair, 3), sample_text(pair, 4))
    )
    assert without.sets == given.sets and given.sets[-1].ablation_kl != other.sets[-1].ablation_kl


@pytest.mark.slow
def test_sets_stay_within_the_budget_as_they_grow(pair, prompts, text):
    with torch.no_grad():
        free = find(pair, prompts, text, SearchOptions(4, budget=math.inf, candidates=ALL))
        budget = 0.7 * free.sets[-1].ablation_kl
        found = find(pair, prompts, text, SearchOptions(4, budget=budget, candidates=ALL))
    assert found.best != free.best
    for one in found.sets:
        assert one.ablation_kl == pytest.approx(kl_of_turning_off(pair, text, one.channels), rel=1e-9)
        assert one.ablation_kl <= budget


@pytest.mark.parametrize("most", [1, 2])
def test_a_budget_that_nothing_keeps_within_is_named_with_what_it_would_take(pair, prompts, text, helpful_costs, most):
    budget = helpful_costs[0] * 0.99
    message = rf"task='toy': no channel raises P\(target\) \(by='dense'\) within budget={budget:g} nats per token"
    with pytest.raises(NoChannelsFoundError, match=message) as error:
        find(pair, prompts, text, SearchOptions(most, budget=budget, candidates=ALL))
    assert f"the cheapest that raises it costs {helpful_costs[0]:.3g}; pass a larger budget=" in str(error.value)


@pytest.mark.parametrize("most", [1, 8])
def test_a_set_is_found_whenever_one_helpful_channel_keeps_within_the_budget(pair, prompts, text, helpful_costs, most):
    """At whichever site it is, not only at those that score best."""
    found = find(pair, prompts, text, SearchOptions(most, budget=helpful_costs[0] * 1.0001, candidates=ALL))
    assert found.sets[0].ablation_kl == pytest.approx(helpful_costs[0], rel=1e-9)


@pytest.mark.slow
def test_every_location_is_searched_if_the_preferred_ones_have_none_within_the_budget(
    pair, prompts, run, unedited, text, monkeypatch
):
    """The only channel that costs nothing helps, though others at its site are predicted to do more."""
    unlikely = [
        Channels(pair.bridge_set.sites[i], (channel,), at)
        for (i, at), effects in predicted_effects(pair, prompts).items()
        for channel in effects.topk(ALL).indices[4:].tolist()
    ]
    free = [one for one in unlikely if written_p_target(pair, run, one).mean() > unedited][-1]
    costs = ReferenceText.ablation_kl
    monkeypatch.setattr(ReferenceText, "ablation_kl", lambda self, one: 0.0 if one == free else costs(self, one))
    found = find(pair, prompts, text, SearchOptions(2, budget=1e-12, candidates=ALL))
    assert (found.best.site, found.best.channels) == (free.site, free.channels)
    assert found.sets[0].ablation_kl < 1e-12


def test_a_task_whose_counterfactuals_change_nothing_has_no_channels(pair, text):
    task = toy_task()
    prompts = Prompts(pair, task.replaced(counterfactual_ids=task.input_ids))
    with pytest.raises(NoChannelsFoundError, match=r"none of the 80 channels tried raises P\(target\) \(by='dense'\)"):
        find(pair, prompts, text, SearchOptions(candidates=8))


def test_bridges_with_nan_are_refused():
    broken = with_units(join(gpt2(), sparse_model()))
    with torch.no_grad():
        for bridge in broken.bridge_set:
            bridge.decoder_weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"task='toy': P\(target\) is NaN under every edit"):
        find(broken, Prompts(broken, toy_task()), sample_text(broken, 0), SearchOptions(candidates=8))


def grown(site, *p_targets):
    """Sets of 1, 2, ... channels with these margins, by the dense model and by both."""
    return [
        ChannelSet(Channels(site, tuple(range(size)), "read"), p, p, 0.0, 0.0)
        for size, p in enumerate(p_targets, start=1)
    ]


@pytest.mark.parametrize(("reached", "kept"), [((0.5, 0.9, 0.93, 0.94), 2), ((0.5, 0.6, 0.7, 0.8), 4), ((0.9, 0.5), 1)])
@pytest.mark.parametrize("by", ["dense", "both"])
def test_the_smallest_set_that_does_nearly_as_much_is_kept(reached, kept, by):
    sets = grown("1.attn", *reached)
    assert smallest_sufficient([grown("0.mlp", 0.1, 0.7), sets, grown("1.mlp", 0.3)], by) == sets[:kept]


def test_what_random_directions_do_counts_against_a_set():
    strong, honest = grown("0.mlp", 0.9), grown("1.attn", 0.6)
    strong = [strong[0]._replace(p_target_random=0.5)]
    assert smallest_sufficient([strong, honest], "dense") == honest
    helpless = [strong[0]._replace(p_target_random=1.0)]  # below its control
    assert helpless[0].margin("both") == 0.0
    assert honest[0]._replace(p_target_sparse=0.5).margin("both") == pytest.approx((0.6 * 0.5) ** 0.5)
