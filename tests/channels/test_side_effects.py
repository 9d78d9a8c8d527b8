"""Side effects and agreement against loops, on a tiny random pair in float64."""

import numpy as np
import pytest
import torch
from pairs import gpt2, join, tokens, toy_task, with_units

from bridges.channels.prompts import Channels, prompts_of
from bridges.channels.side_effects import (
    AGREEMENT_STRENGTHS,
    OTHER_PROMPTS,
    SHUFFLES,
    _answer,
    _fit,
    constant_changes,
    constant_edits,
    intervention_agreement,
    other_tasks,
    side_effects,
)
from bridges.steering.counterfactual import counterfactual
from bridges.steering.edits import Edit
from bridges.steering.steer import steer
from bridges.tasks.pairs import TASKS, probability

CHOSEN = Channels("1.attn", (0, 3), "residual")


@pytest.mark.parametrize("at", ["read", "residual"])
def test_side_effects_are_those_of_edits_in_steer(pair, prompts, at):
    """The channels set to 0, and each one's constant added, by the public context on the whole model."""
    text, site, chosen = tokens(5, 8, seed=9), 2, CHOSEN._replace(at=at)
    others = [toy_task(seed=8), toy_task(seed=9, rows=4)]
    found = side_effects(pair, prompts, chosen, text, others, batch_size=2)
    bridge, off = pair.bridge_set[site], [Edit("1.attn", c, 0.0, "set") for c in CHOSEN.channels]

    def logits_under(edits, ids):
        with torch.no_grad(), steer(pair.dense.model, pair.bridge_set, edits, sparse=pair.sparse.model, at=at):
            return pair.dense.model(ids).logits.log_softmax(-1)

    def kl(plain, logits):
        return (plain.exp() * (plain - logits)).sum(-1).mean().item()

    plain, edited = logits_under([], text), logits_under(off, text)
    assert found.kl == pytest.approx(kl(plain, edited), rel=1e-6) and found.kl > 1e-6
    ce = (plain - edited)[:, :-1].gather(2, text[:, 1:, None]).mean().item()
    assert found.ce_change == pytest.approx(ce, abs=1e-6) and found.tokens == 40
    added = 0.0
    for constants in constant_changes(prompts, site, CHOSEN.channels):
        values = constants * bridge.gain_sparse / bridge.rms_sparse
        edits = [Edit("1.attn", c, values[c].item(), "add") for c in CHOSEN.channels]
        added += kl(plain, logits_under(edits, text)) / 2
    assert found.kl_added == pytest.approx(added, rel=1e-6)
    p = probability(logits_under(off, prompts.pairs.input_ids)[:, -1], prompts.pairs.targets)
    assert found.p_target_off == pytest.approx(max(p[0::2].mean().item(), p[1::2].mean().item()))
    rows = [(logits_under([], one.input_ids)[:, -1], logits_under(off, one.input_ids)[:, -1]) for one in others]
    plain, edited = (torch.cat(side) for side in zip(*rows, strict=True))
    assert found.kl_other_tasks == pytest.approx(kl(plain, edited), rel=1e-6)
    pairs = [torch.cat([one[i] for one in others]) for i in (5, 4)]  # targets, answers
    for logits, part in zip((plain, edited), found.solved_other_tasks, strict=True):
        p_targets, p_answers = (probability(logits, tokens) for tokens in pairs)
        assert part == pytest.approx((p_answers > p_targets).double().mean().item())


def test_without_other_tasks_nothing_is_said_of_them(pair, prompts):
    found = side_effects(pair, prompts, CHOSEN, tokens(2, 6))
    assert found.kl_other_tasks is None and found.solved_other_tasks is None and "solved" not in str(found)


def test_other_tasks_are_those_that_the_tokenizer_lets_be_made_and_the_rest_is_named(monkeypatch):
    def made(name, tokenizer, n, max_tokens):
        if name == "var_swap":
            raise ValueError("no room")
        assert (tokenizer, n, max_tokens) == ("a tokenizer", OTHER_PROMPTS, 26)
        return toy_task()._replace(task=name)

    monkeypatch.setattr("bridges.channels.side_effects.task_pairs", made)
    with pytest.warns(UserWarning, match="leave out the task 'var_swap': no room"):
        found = other_tasks("for_while", "a tokenizer", limit=26)
    assert [one.task for one in found] == [name for name in TASKS if name not in ("for_while", "var_swap")]


def test_the_constant_is_the_mean_of_the_largest_change(prompts):
    found = constant_changes(prompts, 2, (0, 3))
    for side in (0, 1):
        for channel in range(12):
            rows = prompts.dz[2][side::2, :, channel]
            largest = [row[row.abs().argmax()].item() for row in rows]
            expected = np.mean(largest) if channel in (0, 3) else 0.0
            assert found[side, channel].item() == pytest.approx(expected)


def test_constant_edits_are_those_changes_in_read_units(pair, prompts):
    found = constant_edits(pair.dense.model, pair.sparse.model, pair.bridge_set, CHOSEN, toy_task(), direction=1)
    bridge = pair.bridge_set[2]
    for edit, channel in zip(found, (0, 3), strict=True):
        expected = constant_changes(prompts, 2, (0, 3))[1, channel] * bridge.gain_sparse[channel] / bridge.rms_sparse
        assert (edit.site, edit.channel, edit.constant) == ("1.attn", channel, True)
        assert edit.value == pytest.approx(expected.item())


def odds(logits, pairs):
    p, q = (probability(logits[:, -1], tokens) for tokens in (pairs.targets, pairs.answers))
    return (p / q).log()


@pytest.mark.parametrize("at", ["read", "residual"])
def test_agreement_is_the_regression_of_dense_on_sparse_changes(pair, prompts, at):
    """Against the public context on the dense model, and a run of the sparse model with its channels changed."""
    found = intervention_agreement(pair, prompts, CHOSEN._replace(at=at))
    ids, other = prompts.pairs.input_ids, prompts.pairs.counterfactual_ids
    edits = [counterfactual(pair.sparse.model, "1.attn", c, ids, other) for c in CHOSEN.channels]
    change = torch.zeros_like(prompts.dz[2])
    for c in CHOSEN.channels:
        change[..., c] = (prompts.dz if at == "residual" else prompts.dn)[2][..., c]
    dense, sparse = [], []
    with torch.no_grad():
        plain = [odds(model(ids).logits, prompts.pairs) for model in (pair.dense.model, pair.sparse.model)]
        for strength in AGREEMENT_STRENGTHS:
            with steer(pair.dense.model, pair.bridge_set, edits, strength=strength, at=at):
                dense.append(odds(pair.dense.model(ids).logits, prompts.pairs) - plain[0])
            if at == "residual":
                hooked = pair.sparse.hook_residuals({2: lambda h, s=strength: h + s * change})
            else:
                hooked = pair.sparse.hook_reads({2: lambda h, s=strength: h + s * change})
            with hooked:
                sparse.append(odds(pair.sparse.model(ids).logits, prompts.pairs) - plain[1])
    x, y = torch.stack(sparse).flatten(), torch.stack(dense).flatten()
    assert found.slope == pytest.approx(np.polyfit(x, y, 1)[0], rel=1e-6)
    assert found.r_squared == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, rel=1e-6)
    assert found.sign == pytest.approx((x.sign() == y.sign()).double().mean().item())
    assert 0 <= found.r_squared_shuffled <= 1


def test_the_control_edits_other_channels_that_the_prompts_change(pair, prompts, monkeypatch):
    drawn = []

    def noted(_pair, prompts, chosen, side):
        drawn.append((chosen.channels, side))
        return torch.rand(4, 6)

    monkeypatch.setattr("bridges.channels.side_effects._answer_changes", noted)
    intervention_agreement(pair, prompts, CHOSEN)
    controls = [channels for channels, side in drawn[2:] if side == "sparse"]
    changed = {c for c in range(12) if prompts.dz[2][..., c].any()} - set(CHOSEN.channels)
    assert len(controls) == SHUFFLES and all(len(set(one)) == 2 and set(one) <= changed for one in controls)
    assert len(set(controls)) > 1


def test_without_enough_other_channels_there_is_no_control(pair, prompts):
    """Width 12: seven channels leave five."""
    found = intervention_agreement(pair, prompts, CHOSEN._replace(channels=tuple(range(7))))
    assert found.r_squared_shuffled is None and "shuffled channels none" in str(found)


def test_answers_that_are_impossible_to_the_last_bit_stay_finite():
    pairs = toy_task(rows=2)
    logits = torch.full((2, 1, 17), -2000.0, dtype=torch.float64)
    logits[..., 0] = 0.0
    assert _answer(logits, pairs).isfinite().all()


def test_slope_and_r_squared_are_numpys():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    y = 2 * x + 0.5 * torch.randn(4, 5, generator=generator, dtype=torch.float64) + 3
    slope, r_squared = _fit(x, y)
    assert slope == pytest.approx(np.polyfit(x.flatten(), y.flatten(), 1)[0])
    assert r_squared == pytest.approx(np.corrcoef(x.flatten(), y.flatten())[0, 1] ** 2)
    assert _fit(torch.ones(3), torch.arange(3.0)) == (0.0, 0.0)
    assert _fit(torch.tensor([0.0, 1e-7, -1e-7]), torch.arange(3.0)) == (0.0, 0.0)  # rounding explains nothing


def test_an_agreement_of_a_model_with_itself_is_whole():
    """The dense model as its own sparse one, bridges of identity: the same edit does the same."""
    model = gpt2()
    pair = with_units(join(model, gpt2(), k=8))
    with torch.no_grad():
        for bridge in pair.bridge_set:
            bridge.decoder_weight.copy_(torch.eye(8))
            bridge.rms_dense.copy_(bridge.rms_sparse)
    prompts = prompts_of(pair, toy_task())
    found = intervention_agreement(pair, prompts, Channels("0.mlp", (1,), "residual"))
    assert found.slope == pytest.approx(1) and found.r_squared == pytest.approx(1) and found.sign == 1
    assert found.r_squared_shuffled < 0.9


@pytest.mark.parametrize(
    ("chosen", "options", "message"),
    [
        (CHOSEN, {"direction": 2}, "direction=2 must be 0 or 1"),
        (CHOSEN._replace(channels=(12,)), {}, "channel=12 must lie between 0 and 11"),
        (CHOSEN._replace(site="9.mlp"), {}, "site='9.mlp' has no bridge"),
    ],
)
def test_constant_edits_that_cannot_be_are_refused(pair, unchecked, chosen, options, message):
    with pytest.raises(ValueError, match=message):
        constant_edits(pair.dense.model, pair.sparse.model, pair.bridge_set, chosen, toy_task(), **options)


def test_a_sparse_model_that_never_moves_has_no_sign(pair, prompts, monkeypatch):
    def still(_pair, prompts, chosen, side):
        return torch.zeros(4, 6) if side == "sparse" else torch.rand(4, 6)

    monkeypatch.setattr("bridges.channels.side_effects._answer_changes", still)
    found = intervention_agreement(pair, prompts, CHOSEN)
    assert found.sign is None and "same sign none" in str(found)
