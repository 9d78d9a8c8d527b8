"""How sets of channels grow and what they may cost, on a tiny random pair in float64."""

import pytest
import torch
from pairs import gpt2, join, kl_of_turning_off, sparse_model, toy_task, with_units

from bridges.channels.find import find, find_channels
from bridges.channels.prompts import Channels, addend_of, p_target, text_of
from bridges.channels.search import Search, log_p, predicted_effects, sampled
from bridges.steering.delta import dense_addend, edited_logits, mask_channels


@pytest.fixture(scope="module")
def text(pair):
    return text_of(pair, sampled(pair, seed=3))


@pytest.mark.parametrize("at", ["read", "residual"])
@pytest.mark.parametrize("site", range(5))
def test_predicted_effects_are_the_derivative_of_log_p(pair, prompts, site, at):
    """Against central differences, for three channels."""
    predicted = predicted_effects(pair, prompts)[site, at]
    where = pair.site("dense", site)

    def log_p(channel, strength):
        addend = strength * dense_addend(pair, site, mask_channels(prompts.dz[site], [channel]), at)
        with torch.no_grad():
            logits = edited_logits(pair.dense, prompts.traces.dense, where, addend, at)
        return p_target(logits, prompts.pairs).log().mean()

    for channel in predicted.abs().topk(3).indices.tolist():
        slope = (log_p(channel, 1e-5) - log_p(channel, -1e-5)) / 2e-5
        assert abs(predicted[channel] - slope) < 1e-4 * slope.abs() + 1e-6


def test_where_no_text_is_given_it_is_sampled_from_the_dense_model(pair, text):
    assert text.trace.context.input_ids.shape == (16, 12)  # as long as the model's context
    assert torch.equal(text.trace.context.input_ids, sampled(pair, 3))
    assert not torch.equal(text.trace.context.input_ids, sampled(pair, 4))
    assert not any(torch.equal(sampled(pair, seed), sampled(pair, 3, search=False)) for seed in range(6))
    models = pair.dense.model, pair.sparse.model, pair.bridge_set
    without, given, other = (
        find_channels(*models, toy_task(), candidates=8, seed=3, text=rows)
        for rows in (None, sampled(pair, 3), sampled(pair, 4))
    )
    assert without.sets == given.sets and given.sets[-1].kl_off != other.sets[-1].kl_off


def test_sets_stay_within_the_budget_as_they_grow(pair, prompts, text):
    with torch.no_grad():
        free = find(pair, prompts, text, 4, budget=float("inf"), candidates=12)
        budget = 0.7 * free.sets[-1].kl_off
        found = find(pair, prompts, text, 4, budget=budget, candidates=12)
    assert found.best != free.best
    for one in found.sets:
        assert one.kl_off == pytest.approx(kl_of_turning_off(pair, text, one.channels), rel=1e-9)
        assert one.kl_off <= budget


def test_a_budget_that_nothing_keeps_within_is_lifted(pair, prompts, text):
    free = find(pair, prompts, text, 2, budget=float("inf"), candidates=12)
    assert free.sets[-1].kl_off > 0
    with pytest.warns(
        UserWarning, match="budget=0.0: no channel raises P\\(target\\) of 'toy' within it; it was lifted"
    ):
        lifted = find(pair, prompts, text, 2, budget=0.0, candidates=12)
    assert lifted.sets == free.sets


def test_channels_that_only_make_things_worse_are_told_too(pair, prompts, text, monkeypatch):
    monkeypatch.setattr(Search, "unedited", lambda _: 2.0)
    with pytest.warns(UserWarning, match="it was lifted"):
        assert find(pair, prompts, text, 2, candidates=12).sets


def test_bridges_that_are_not_finite_are_named(prompts):
    broken = with_units(join(gpt2(), sparse_model()))
    with torch.no_grad():
        for bridge in broken.bridge_set:
            bridge.decoder_weight.fill_(float("nan"))
        elsewhere = text_of(broken, sampled(broken, 0))
    with pytest.raises(FloatingPointError, match="no edit's P\\(target\\) of 'toy' is a number"):
        find(broken, prompts, elsewhere, candidates=8)


def test_a_probability_of_zero_leaves_predictions_finite():
    p = torch.tensor([0.0, 0.5], requires_grad=True)
    log_p(p).backward()
    assert log_p(p).isfinite() and p.grad.isfinite().all() and p.grad[1] == 1


def test_predicted_effects_in_the_sparse_model_are_derivatives_too(pair, prompts):
    for (i, at), effects in predicted_effects(pair, prompts, "sparse").items():
        site, trace = pair.site("sparse", i), prompts.traces.sparse
        for channel in effects.abs().topk(2).indices.tolist():
            chosen = Channels(pair.bridge_set.sites[i], (channel,), at)
            change = 1e-6 * addend_of(pair, prompts, chosen, "sparse")
            with torch.no_grad():
                ends = [edited_logits(pair.sparse, trace, site, sign * change, at) for sign in (1, -1)]
            up, down = (p_target(x, prompts.pairs).log().mean() for x in ends)
            assert abs(effects[channel] - (up - down) / 2e-6) < 1e-4 * effects[channel].abs() + 1e-6
