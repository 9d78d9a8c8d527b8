"""Finding channels, on a tiny random pair in float64."""

import pytest
import torch
from pairs import kl_of_turning_off, toy_task
from scipy.stats import spearmanr

import bridges
from bridges.channels.find import find, find_channels
from bridges.channels.prompts import Channels, addend_of, edited, p_target, text_of
from bridges.channels.search import CONTROLS, Grown, Search, predicted_effects, sampled
from bridges.steering.delta import edited_logits, random_addends
from bridges.steering.steer import steer


def test_p_target_sums_the_last_tokens_softmax_over_the_answers(prompts):
    logits = torch.randn(6, 7, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits[:, -1].softmax(-1)
    expected = [p[i, [t for t in row if t >= 0]].sum() for i, row in enumerate(prompts.pairs.targets.tolist())]
    assert torch.allclose(p_target(logits, prompts.pairs), torch.stack(expected))


@pytest.fixture(scope="module")
def text(pair):
    return text_of(pair, sampled(pair, seed=3))


def every_single_edit(pair, prompts):
    for site in pair.bridge_set.sites:
        for at in ("read", "residual"):
            for channel in range(12):
                yield Channels(site, (channel,), at)


def under_random_directions(pair, prompts, chosen):
    site = pair.site("dense", pair.bridge_set.index(chosen.site))
    trace, addend = prompts.traces.dense, addend_of(pair, prompts, chosen)
    logits = [edited_logits(pair.dense, trace, site, x, chosen.at) for x in random_addends(addend, CONTROLS, seed=0)]
    return max(p_target(x, prompts.pairs).mean().item() for x in logits)


@pytest.mark.parametrize("part", [0.3, 1.0])
def test_the_found_channel_does_most_beyond_a_random_direction(pair, prompts, text, part):
    """At each place the channel of largest P(target) within the budget, of those the one that beats its control by
    most. The budget is such that a part of all channels keeps within it."""
    with torch.no_grad():
        costs = {one: kl_of_turning_off(pair, text, one) for one in every_single_edit(pair, prompts)}
    budget = sorted(costs.values())[int(part * (len(costs) - 1))] * 1.0001
    found = find(pair, prompts, text, budget=budget, candidates=12)  # every channel of the width 12
    with torch.no_grad():
        scored = {one: edited(pair, prompts, one).mean().item() for one in every_single_edit(pair, prompts)}
        within = {one: p for one, p in scored.items() if costs[one] <= budget}
        places = {
            (one.site, one.at): max((p, c) for c, p in within.items() if (c.site, c.at) == (one.site, one.at))
            for one in within
        }
        margins = {c: p - under_random_directions(pair, prompts, c) for p, c in places.values()}
    assert found.best == max(margins, key=margins.get)
    assert found.sets[0].p_target == pytest.approx(scored[found.best])
    assert found.sets[0].margin("dense") == pytest.approx(max(margins.values()))
    assert found.sets[0].kl_off == pytest.approx(costs[found.best], rel=1e-9)
    assert len(found.ranking) == len(scored)
    assert [one.p_target for one in found.ranking] == sorted(scored.values(), reverse=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (torch.zeros(0, 5).long(), r"text=\(0, 5\) must be a tensor of token ids \[rows, seq\]"),
        (torch.zeros(5).long(), r"text=\(5,\) must be"),
        (torch.zeros(2, 5), r"text=\(2, 5\) must be"),
        ([[1, 2]], "text=list must be"),
        (torch.full((1, 3), 99), "text holds token 99; the models know 0 to 16"),
        (torch.zeros(1, 13).long(), "text has rows of 13 tokens, over the models' context of 12; cut them to that"),
    ],
)
def test_text_that_cannot_be_is_refused(pair, unchecked, text, message):
    models = pair.dense.model, pair.sparse.model, pair.bridge_set
    with pytest.raises(ValueError, match=message):
        find_channels(*models, toy_task(), text=text)


def test_the_ranking_tells_prediction_and_effect_and_how_they_agree(pair, prompts, text):
    found = find(pair, prompts, text, candidates=3)
    assert len(found.ranking) == 3 * 2 * 5
    before = p_target(prompts.traces.dense.logits, prompts.pairs).log().mean()
    predicted = predicted_effects(pair, prompts)
    for one in found.ranking:
        p = edited(pair, prompts, Channels(one.site, (one.channel,), one.at))
        assert one.effect == pytest.approx((p.log().mean() - before).item(), abs=1e-12)
        assert one.predicted == predicted[pair.bridge_set.index(one.site), one.at][one.channel]
    expected = spearmanr([one.predicted for one in found.ranking], [one.effect for one in found.ranking])[0]
    assert found.agreement == pytest.approx(expected)


def in_sparse(pair, prompts, chosen):
    """P(target) of the sparse model whose stream or read is changed at the channels, written out."""
    i = pair.bridge_set.index(chosen.site)
    site, trace = pair.site("sparse", i), prompts.traces.sparse
    change = torch.zeros_like(prompts.dz[i])
    whole = prompts.dz if chosen.at == "residual" else prompts.dn
    for channel in chosen.channels:
        change[..., channel] = whole[i][..., channel]
    return p_target(edited_logits(pair.sparse, trace, site, change, chosen.at), prompts.pairs).mean().item()


@pytest.mark.parametrize("by", ["dense", "both"])
def test_sets_grow_by_one_channel_and_by_what_it_adds(pair, prompts, text, by):
    with torch.no_grad():
        found = find(
            pair, prompts, text, 2, by, float("inf"), candidates=24
        )  # by both, half of them: every channel again
        assert 1 <= len(found.sets) <= 2

        def score(chosen):
            dense = edited(pair, prompts, chosen).mean().item()
            return dense if by == "dense" else (dense * in_sparse(pair, prompts, chosen)) ** 0.5

        for size, one in enumerate(found.sets, 1):
            chosen = one.channels
            assert len(chosen.channels) == size and one.p_target == pytest.approx(edited(pair, prompts, chosen).mean())
            assert one.p_target_sparse == pytest.approx(in_sparse(pair, prompts, chosen))
            assert one.p_target_random == pytest.approx(under_random_directions(pair, prompts, chosen))
            kept = chosen.channels[:-1]
            others = [score(chosen._replace(channels=(*kept, c))) for c in range(12) if c not in kept]
            assert score(chosen) == pytest.approx(max(others))


@pytest.mark.parametrize(("reached", "kept"), [((0.5, 0.9, 0.93, 0.94), 2), ((0.5, 0.6, 0.7, 0.8), 4), ((0.9, 0.5), 1)])
def test_the_smallest_set_that_does_nearly_as_much_is_kept(pair, prompts, text, monkeypatch, reached, kept):
    """By what it does beyond random directions: here its own P(target) alone, since they do nothing."""

    def grow(search, place, most, budget, least):
        chosen = Channels(pair.bridge_set.sites[place[0]], tuple(range(len(reached))), place[1])
        strength = 1.0 if place == (2, "read") else 0.5  # the other places do less
        sets = [chosen._replace(channels=chosen.channels[: size + 1]) for size in range(len(reached))]
        return [Grown(one, strength * p, 0.0, 0.0, 0.0) for one, p in zip(sets, reached, strict=True)]

    monkeypatch.setattr(Search, "grow", grow)
    found = find(pair, prompts, text, candidates=8)  # one at most: sets are grown everywhere
    assert found.best == Channels(pair.bridge_set.sites[2], tuple(range(kept)), "read")
    assert len(found.sets) == kept


@pytest.mark.parametrize("at", ["read", "residual"])
def test_an_edit_here_is_what_steer_does_to_the_model(pair, prompts, at):
    """The search runs the tail of a trace; a user runs the model."""
    chosen = Channels("1.attn", (0, 3, 7), at)
    pairs = prompts.pairs
    edits = [
        bridges.counterfactual(pair.sparse.model, chosen.site, c, pairs.input_ids, pairs.counterfactual_ids)
        for c in chosen.channels
    ]
    with torch.no_grad(), steer(pair.dense.model, pair.bridge_set, edits, at=at, strength=0.7):
        logits = pair.dense.model(pairs.input_ids).logits
    assert torch.allclose(p_target(logits, pairs), edited(pair, prompts, chosen, 0.7), atol=1e-12)
    assert addend_of(pair, prompts, chosen).abs().max() > 0.01


def test_the_public_function_leaves_the_models_as_they_were(pair, prompts, text):
    dense, sparse = pair.dense.model, pair.sparse.model
    dense.train()  # with dropout, unless it is turned off inside
    found = find_channels(dense, sparse, pair.bridge_set, toy_task(), candidates=8)
    assert dense.training and all(p.requires_grad for p in dense.parameters())
    dense.eval()
    assert found.ranking[0] == find(pair, prompts, text, candidates=8).ranking[0] and found.task == "toy"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"most": 9}, "most=9 must be a whole number between 1 and 8"),
        ({"by": "sparse"}, "by='sparse' must be one of dense, both"),
        ({"candidates": 7}, "candidates=7 must be a whole number, at least 8"),
        ({"task": "for_while"}, "task='for_while' needs tokenizer="),
    ],
)
def test_what_cannot_be_is_refused(pair, given, message, unchecked):
    arguments = {"task": toy_task()} | given
    with pytest.raises(ValueError, match=message):
        find_channels(pair.dense.model, pair.sparse.model, pair.bridge_set, **arguments)
