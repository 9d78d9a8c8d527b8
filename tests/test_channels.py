"""Finding channels, on a tiny random pair in float64."""

import pytest
import torch
from pairs import gpt2, join, sparse_model, tokens, with_units
from scipy.stats import spearmanr

import bridges
from bridges.channels import (
    Channels,
    addend_of,
    edited,
    find,
    find_channels,
    p_target,
    predicted_effects,
    prompts_of,
)
from bridges.circuits.tasks import TaskPairs
from bridges.intervention import dense_addend, edited_logits, only
from bridges.steer import steer


@pytest.fixture(scope="module")
def pair():
    return with_units(join(gpt2(), sparse_model()))


def task(seed=5, rows=6):
    ids = tokens(rows=rows, seed=seed)
    other = ids.clone()
    other[:, 2] = (other[:, 2] + 3) % 17
    answers = torch.tensor([[3, -1], [4, 6]] * (rows // 2))
    return TaskPairs("toy", ids, other, torch.ones_like(ids), answers, answers.roll(1, 0), torch.arange(rows) % 2)


@pytest.fixture(scope="module")
def prompts(pair):
    return prompts_of(pair, task())


@pytest.mark.parametrize("at", ["read", "residual"])
@pytest.mark.parametrize("site", range(5))
def test_predicted_effects_are_the_derivative_of_log_p(pair, prompts, site, at):
    """Against central differences, for three channels."""
    predicted = predicted_effects(pair, prompts)[site, at]
    where = pair.site("dense", site)

    def log_p(channel, strength):
        addend = strength * dense_addend(pair, site, only(prompts.streams[site], [channel]), at)
        with torch.no_grad():
            logits = edited_logits(pair.dense, prompts.traces.dense, where, addend, at)
        return p_target(logits, prompts.pairs).log().mean()

    for channel in predicted.abs().topk(3).indices.tolist():
        slope = (log_p(channel, 1e-5) - log_p(channel, -1e-5)) / 2e-5
        assert abs(predicted[channel] - slope) < 1e-4 * slope.abs() + 1e-6


def test_p_target_sums_the_last_tokens_softmax_over_the_answers(prompts):
    logits = torch.randn(6, 7, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits[:, -1].softmax(-1)
    expected = [p[i, [t for t in row if t >= 0]].sum() for i, row in enumerate(prompts.pairs.targets.tolist())]
    assert torch.allclose(p_target(logits, prompts.pairs), torch.stack(expected))


def every_single_edit(pair, prompts):
    for site in pair.bridge_set.sites:
        for at in ("read", "residual"):
            for channel in range(12):
                yield Channels(site, (channel,), at)


def test_the_found_channel_is_the_best_of_those_tried(pair, prompts):
    found = find(pair, prompts, candidates=12)  # every channel of the width 12
    with torch.no_grad():
        scored = {one: edited(pair, prompts, one).mean().item() for one in every_single_edit(pair, prompts)}
    assert found.best == max(scored, key=scored.get) and found.p_target[0] == pytest.approx(max(scored.values()))
    assert len(found.ranking) == len(scored)
    assert [one.p_target for one in found.ranking] == sorted(scored.values(), reverse=True)


def test_the_ranking_tells_prediction_and_effect_and_how_they_agree(pair, prompts):
    found = find(pair, prompts, candidates=3)
    assert len(found.ranking) == 3 * 2 * 5
    before = p_target(prompts.traces.dense.logits, prompts.pairs).log().mean()
    predicted = predicted_effects(pair, prompts)
    for one in found.ranking:
        p = edited(pair, prompts, Channels(one.site, (one.channel,), one.at))
        assert one.effect == pytest.approx((p.log().mean() - before).item(), abs=1e-12)
        assert one.predicted == predicted[pair.bridge_set.index(one.site), one.at][one.channel]
    expected = spearmanr([one.predicted for one in found.ranking], [one.effect for one in found.ranking])[0]
    assert found.agreement == pytest.approx(expected)


@pytest.mark.slow
def test_sets_grow_by_one_channel_and_by_what_it_adds(pair, prompts):
    found = find(pair, prompts, most=4, candidates=12)
    assert 1 < len(found.sets) <= 4 and found.p_target == sorted(found.p_target)
    for smaller, larger, p in zip(found.sets, found.sets[1:], found.p_target[1:], strict=False):
        assert larger.channels[:-1] == smaller.channels and larger.site == smaller.site
        others = [
            edited(pair, prompts, smaller._replace(channels=(*smaller.channels, c))).mean().item()
            for c in range(12)
            if c not in smaller.channels
        ]
        assert p == pytest.approx(max(others))


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


def test_the_public_function_leaves_the_models_as_they_were(pair, prompts):
    dense, sparse = pair.dense.model, pair.sparse.model
    dense.train()  # with dropout, unless it is turned off inside
    found = find_channels(dense, sparse, pair.bridge_set, task(), candidates=12)
    assert dense.training and all(p.requires_grad for p in dense.parameters())
    dense.eval()
    assert found.ranking[0] == find(pair, prompts, candidates=12).ranking[0] and found.task == "toy"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"most": 9}, "most=9 must lie between 1 and 8"),
        ({"task": "for_while"}, "task='for_while' needs tokenizer="),
    ],
)
def test_what_cannot_be_is_refused(pair, given, message):
    arguments = {"task": task()} | given
    with pytest.raises(ValueError, match=message):
        find_channels(pair.dense.model, pair.sparse.model, pair.bridge_set, **arguments)
