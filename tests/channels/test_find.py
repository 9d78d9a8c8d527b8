"""Finding channels, on a tiny random pair in float64."""

import pytest
import torch
from pairs import kl_of_turning_off, toy_task
from scipy.stats import spearmanr
from whole import whole_run, written_addend, written_logits, written_p, written_p_target

from bridges.channels.attribution import predicted_effects
from bridges.channels.find import find, find_channels
from bridges.channels.measured_edits import SEARCH_DIRECTIONS
from bridges.channels.prompts import Channels
from bridges.channels.reference_text import sample_text
from bridges.channels.search import SearchOptions
from bridges.objective.pair import SIDES
from bridges.steering.delta import random_addends


@pytest.fixture(scope="module")
def text(pair):
    return sample_text(pair, seed=3)


@pytest.fixture(scope="module")
def run(pair, prompts):
    return whole_run(pair, prompts.pairs)


def every_single_edit(pair):
    for site in pair.bridge_set.sites:
        for at in ("read", "residual"):
            for channel in range(12):
                yield Channels(site, (channel,), at)


def under_random_directions(pair, run, chosen):
    addends = random_addends(written_addend(pair, run, chosen), SEARCH_DIRECTIONS, seed=0)
    logits = [written_logits(pair, run, chosen, addend=addend) for addend in addends]
    return max(written_p(x, run.pairs.targets).mean().item() for x in logits)


@pytest.mark.slow
@pytest.mark.parametrize("part", [0.3, 1.0])
def test_the_found_channel_does_most_beyond_a_random_direction(pair, prompts, run, text, part):
    """At each site and entry point the channel of largest P(target) within the budget; of those the one that beats its
    random directions by most. `part` of all channels keep within the budget."""
    with torch.no_grad():
        costs = {one: kl_of_turning_off(pair, text, one) for one in every_single_edit(pair)}
    budget = sorted(costs.values())[int(part * (len(costs) - 1))] * 1.0001
    found = find(pair, prompts, text, SearchOptions(budget=budget, candidates=12))  # every channel of the width 12
    with torch.no_grad():
        scored = {one: written_p_target(pair, run, one).mean().item() for one in every_single_edit(pair)}
        within = {one: p for one, p in scored.items() if costs[one] <= budget}
        locations = {
            (one.site, one.at): max((p, c) for c, p in within.items() if (c.site, c.at) == (one.site, one.at))
            for one in within
        }
        margins = {c: p - under_random_directions(pair, run, c) for p, c in locations.values()}
    assert found.best == max(margins, key=margins.get)
    assert found.sets[0].p_target == pytest.approx(scored[found.best])
    assert found.sets[0].margin("dense") == pytest.approx(max(margins.values()))
    assert found.sets[0].ablation_kl == pytest.approx(costs[found.best], rel=1e-9)
    assert len(found.ranking) == len(scored)
    assert [one.p_target for one in found.ranking] == pytest.approx(sorted(scored.values(), reverse=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (torch.zeros(0, 5).long(), r"text=\(0, 5\) must be a tensor of token ids \[rows, seq\]"),
        (torch.zeros(5).long(), r"text=\(5,\) must be"),
        (torch.zeros(2, 5), r"text=\(2, 5\) must be"),
        ([[1, 2]], "text=list must be"),
        (torch.full((1, 3), 99), "text holds token 99; valid ids are 0 to 16"),
        (torch.zeros(1, 13).long(), "text has rows of 13 tokens, over the models' context of 12; cut them to that"),
    ],
)
def test_text_that_is_no_rows_of_tokens_is_refused(pair, unchecked, text, message):
    models = pair.dense.model, pair.sparse.model, pair.bridge_set
    with pytest.raises(ValueError, match=message):
        find_channels(*models, toy_task(), text=text)


def test_the_ranking_holds_predicted_and_measured_effects_and_their_rank_correlation(pair, prompts, run, text):
    found = find(pair, prompts, text, SearchOptions(candidates=3))
    assert len(found.ranking) == 3 * 2 * 5
    before = written_p(run.traces.dense.logits, run.pairs.targets).log().mean()
    predicted = predicted_effects(pair, prompts)
    for one in found.ranking:
        p = written_p_target(pair, run, Channels(one.site, (one.channel,), one.at))
        assert one.effect == pytest.approx((p.log().mean() - before).item(), abs=1e-12)
        assert one.predicted == predicted[pair.bridge_set.index(one.site), one.at][one.channel]
    expected = spearmanr([one.predicted for one in found.ranking], [one.effect for one in found.ranking])[0]
    assert found.agreement == pytest.approx(expected)


@pytest.mark.parametrize("by", ["dense", "both"])
def test_sets_grow_by_the_channel_that_adds_most(pair, prompts, run, text, by):
    with torch.no_grad():
        # By both models, half the candidates are theirs: every channel again.
        found = find(pair, prompts, text, SearchOptions(2, by, float("inf"), candidates=24))
        assert 1 <= len(found.sets) <= 2

        def score(chosen):
            dense, sparse = (written_p_target(pair, run, chosen, side=side).mean().item() for side in SIDES)
            return dense if by == "dense" else (dense * sparse) ** 0.5

        for size, one in enumerate(found.sets, 1):
            chosen = one.channels
            assert len(chosen.channels) == size and one.p_target == pytest.approx(
                written_p_target(pair, run, chosen).mean()
            )
            assert one.p_target_sparse == pytest.approx(written_p_target(pair, run, chosen, side="sparse").mean())
            assert one.p_target_random == pytest.approx(under_random_directions(pair, run, chosen))
            kept = chosen.channels[:-1]
            others = [score(chosen._replace(channels=(*kept, c))) for c in range(12) if c not in kept]
            assert score(chosen) == pytest.approx(max(others))


def test_the_public_function_leaves_the_models_as_they_were(pair, prompts, text):
    dense, sparse = pair.dense.model, pair.sparse.model
    dense.train()  # with dropout, unless it is turned off inside
    found = find_channels(dense, sparse, pair.bridge_set, toy_task(), candidates=8, text=text)
    assert dense.training and all(p.requires_grad for p in dense.parameters())
    dense.eval()
    assert found.ranking[0] == find(pair, prompts, text, SearchOptions(candidates=8)).ranking[0] and found.task == "toy"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"most": 9}, "most=9 must be a whole number between 1 and 8"),
        ({"by": "sparse"}, "by='sparse' must be one of dense, both"),
        ({"candidates": 7}, "candidates=7 must be a whole number, at least 8"),
        ({"task": "for_while"}, "task='for_while' needs tokenizer="),
    ],
)
def test_a_setting_out_of_range_is_refused(pair, given, message, unchecked):
    arguments = {"task": toy_task()} | given
    with pytest.raises(ValueError, match=message):
        find_channels(pair.dense.model, pair.sparse.model, pair.bridge_set, **arguments)
