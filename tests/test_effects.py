"""Side effects and agreement against loops, on a tiny random pair in float64."""

import numpy as np
import pytest
import torch
from pairs import gpt2, join, sparse_model, tokens, with_units
from test_channels import task

from bridges.channels import Channels, prompts_of
from bridges.circuits.tasks import probability
from bridges.edits import Edit
from bridges.effects import (
    AGREEMENT_STRENGTHS,
    _fit,
    constant_changes,
    constant_edits,
    intervention_agreement,
    side_effects,
)
from bridges.steer import steer

CHOSEN = Channels("1.attn", (0, 3), "residual")


@pytest.fixture(scope="module")
def pair():
    return with_units(join(gpt2(), sparse_model()))


@pytest.fixture(scope="module")
def prompts(pair):
    return prompts_of(pair, task())


@pytest.mark.parametrize("at", ["read", "residual"])
def test_side_effects_are_those_of_a_constant_edit_in_steer(pair, prompts, at):
    text, site = tokens(5, 8, seed=9), 2
    found = side_effects(pair, prompts, CHOSEN._replace(at=at), text, batch_size=2)
    bridge = pair.bridge_set[site]
    kl = ce = 0.0
    with torch.no_grad():
        plain = pair.dense.model(text).logits.log_softmax(-1)
        for constants in constant_changes(prompts, site, CHOSEN.channels):
            values = constants * bridge.gain_sparse / bridge.rms_sparse
            edits = [Edit("1.attn", c, values[c].item(), "add") for c in CHOSEN.channels]
            with steer(pair.dense.model, pair.bridge_set, edits, at=at):
                logits = pair.dense.model(text).logits.log_softmax(-1)
            kl += (plain.exp() * (plain - logits)).sum(-1).mean().item() / 2
            gathered = (plain - logits)[:, :-1].gather(2, text[:, 1:, None])
            ce += gathered.mean().item() / 2
    assert found.kl == pytest.approx(kl, rel=1e-6) and found.ce_change == pytest.approx(ce, abs=1e-6)
    assert found.tokens == 40 and found.kl > 1e-6


def test_the_constant_is_the_mean_of_the_largest_change(prompts):
    found = constant_changes(prompts, 2, (0, 3))
    for side in (0, 1):
        for channel in range(12):
            rows = prompts.streams[2][side::2, :, channel]
            largest = [row[row.abs().argmax()].item() for row in rows]
            expected = np.mean(largest) if channel in (0, 3) else 0.0
            assert found[side, channel].item() == pytest.approx(expected)


def test_constant_edits_are_those_changes_in_read_units(pair, prompts):
    found = constant_edits(pair.dense.model, pair.sparse.model, pair.bridge_set, CHOSEN, task(), direction=1)
    bridge = pair.bridge_set[2]
    for edit, channel in zip(found, (0, 3), strict=True):
        expected = constant_changes(prompts, 2, (0, 3))[1, channel] * bridge.gain_sparse[channel] / bridge.rms_sparse
        assert (edit.site, edit.channel, edit.constant) == ("1.attn", channel, True)
        assert edit.value == pytest.approx(expected.item())


def test_agreement_is_the_regression_of_dense_on_sparse_changes(pair, prompts):
    found = intervention_agreement(pair, prompts, CHOSEN)
    assert found.channels == 8
    from bridges.effects import _answer_change

    with torch.no_grad():
        for side, chain in (("dense", pair.dense), ("sparse", pair.sparse)):
            changes = _answer_change(pair, prompts, side, 2, "residual", 3)
            trace = prompts.traces.side(side)
            add = torch.zeros_like(prompts.streams[2])
            add[..., 3] = prompts.streams[2][..., 3]
            add = pair.bridge_set[2].decode_delta(add) if side == "dense" else add
            for row, strength in zip(changes, AGREEMENT_STRENGTHS, strict=True):
                logits = chain.run_from("1.attn", trace.residuals[2] + strength * add, prompts.pairs.input_ids)
                odds = [
                    (probability(x[:, -1], prompts.pairs.targets) / probability(x[:, -1], prompts.pairs.answers)).log()
                    for x in (logits, trace.logits)
                ]
                assert torch.allclose(row, odds[0] - odds[1], atol=1e-9)
    assert 0 <= found.r_squared <= 1 and 0 <= found.sign <= 1 and found.r_squared_shuffled <= 1


def test_slope_and_r_squared_are_numpys():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    y = 2 * x + 0.5 * torch.randn(4, 5, generator=generator, dtype=torch.float64) + 3
    slope, r_squared = _fit(x, y)
    assert slope == pytest.approx(np.polyfit(x.flatten(), y.flatten(), 1)[0])
    assert r_squared == pytest.approx(np.corrcoef(x.flatten(), y.flatten())[0, 1] ** 2)
    assert _fit(torch.ones(3), torch.arange(3.0)) == (0.0, 0.0)


def test_an_agreement_of_a_model_with_itself_is_whole():
    """The dense model as its own sparse one, bridges of identity: the same edit does the same."""
    model = gpt2()
    pair = with_units(join(model, gpt2(), k=8))
    with torch.no_grad():
        for bridge in pair.bridge_set:
            bridge.decoder_weight.copy_(torch.eye(8))
            bridge.rms_dense.copy_(bridge.rms_sparse)
    prompts = prompts_of(pair, task())
    found = intervention_agreement(pair, prompts, Channels("0.mlp", (1,), "residual"))
    assert found.slope == pytest.approx(1) and found.r_squared == pytest.approx(1) and found.sign == 1
    assert found.r_squared_shuffled < 0.9
