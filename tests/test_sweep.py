"""Finding channels and their curves, on a tiny random pair in float64."""

import pytest
import torch
from pairs import gpt2, join, relative, sparse_model, tokens

from bridges.circuits.tasks import TaskPairs
from bridges.steer import dense_addend, edited_logits, only
from bridges.sweep import find_channels, p_target, predicted_effects, prompts_of, sweep


@pytest.fixture(scope="module")
def pair():
    pair = join(gpt2(), sparse_model())
    for bridge in pair.bridge_set:
        bridge.rms_dense.fill_(1.2)
        bridge.rms_sparse.fill_(0.8)
    return pair


def task(seed=5):
    ids = tokens(rows=6, seed=seed)
    other = ids.clone()
    other[:, 2] = (other[:, 2] + 3) % 17
    answers = torch.tensor([3, 4] * 3)
    return TaskPairs("toy", ids, other, torch.ones_like(ids), answers, 7 - answers)


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
        return logits[:, -1].log_softmax(-1).gather(1, prompts.pairs.targets[:, None]).mean()

    for channel in predicted.abs().topk(3).indices.tolist():
        slope = (log_p(channel, 1e-5) - log_p(channel, -1e-5)) / 2e-5
        assert abs(predicted[channel] - slope) < 1e-4 * slope.abs() + 1e-6


def test_p_target_is_the_last_tokens_softmax(prompts):
    logits = torch.randn(6, 7, 17, generator=torch.Generator().manual_seed(0))
    expected = [logits[i, -1].exp()[t] / logits[i, -1].exp().sum() for i, t in enumerate(prompts.pairs.targets)]
    assert relative(p_target(logits, prompts.pairs), torch.stack(expected)) < 1e-6


def test_the_found_channel_is_the_best_of_those_tried(pair, prompts):
    found = find_channels(pair, prompts, candidates=12)  # every channel of the width 12
    best = 0.0
    for site in range(len(pair.bridge_set)):
        for at in ("read", "residual"):
            for channel in range(12):
                addend = dense_addend(pair, site, only(prompts.streams[site], [channel]), at)
                logits = edited_logits(pair.dense, prompts.traces.dense, pair.site("dense", site), addend, at)
                best = max(best, p_target(logits, prompts.pairs).mean().item())
    assert len(found.channels) == 1
    assert found.p_target == pytest.approx(best, rel=1e-9)
    grown = find_channels(pair, prompts, most=3, candidates=12)
    assert 1 <= len(grown.channels) <= 3
    assert grown.p_target >= found.p_target


def test_sweep_writes_every_baseline_and_starts_at_the_unedited_model(pair, prompts):
    reported = prompts_of(pair, task(seed=6))
    found = find_channels(pair, prompts)
    result = sweep(pair, prompts, reported, found, (0.0, 0.5, 1.0))
    plain = p_target(reported.traces.dense.logits, reported.pairs).mean().item()
    curves = ["p_target", "p_target_random_direction", "p_target_mean_difference", "p_target_all_channels"]
    for name in curves:
        assert len(result[name]) == 3
        assert result[name][0] == pytest.approx(plain, rel=1e-6)
        assert result[name][2] != pytest.approx(plain, rel=1e-6)
    inside = p_target(reported.traces.sparse.logits, reported.pairs).mean().item()
    assert result["p_target_sparse_model"][0] == pytest.approx(inside, rel=1e-6)
    assert result["prompts"] == 6
    by_target = result["p_target_by_target_token"]
    assert sum(by_target.values()) / 2 == pytest.approx(result["p_target"][2])
    assert result["site"] == pair.bridge_set.sites[found.site]


def test_all_channels_at_the_last_site_is_one_affine_push(pair, prompts):
    """At `final` there is nothing after the edit but the head, so the curve can be computed by hand."""
    reported = prompts_of(pair, task(seed=6))
    found = find_channels(pair, prompts)._replace(site=4, at="residual")
    result = sweep(pair, prompts, reported, found, (1.0,))
    bridge = pair.bridge_set[4]
    stream = reported.traces.dense.residuals[-1] + reported.streams[4] @ bridge.decoder_weight.T
    model = pair.dense.model
    with torch.no_grad():
        logits = model.lm_head(model.transformer.ln_f(stream))
    assert result["p_target_all_channels"][0] == pytest.approx(p_target(logits, reported.pairs).mean().item(), rel=1e-6)
