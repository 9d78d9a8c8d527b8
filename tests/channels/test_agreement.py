"""Intervention agreement against loops, on a tiny random pair in float64."""

import numpy as np
import pytest
import torch
from pairs import gpt2, join, toy_task, with_units
from whole import whole_run, written_addend

import bridges
from bridges.channels.agreement import (
    AGREEMENT_STRENGTHS,
    N_CONTROLS,
    changed_channels,
    control_channels,
    intervention_agreement,
    least_squares,
    log_odds,
)
from bridges.channels.prompts import Channels
from bridges.channels.runs import Prompts
from bridges.tasks.pairs import probability

CHOSEN = Channels("1.attn", (0, 3), "residual")


def odds(logits, pairs):
    p, q = (probability(logits[:, -1], tokens) for tokens in (pairs.targets, pairs.answers))
    return (p / q).log()


@pytest.mark.parametrize("at", ["read", "residual"])
def test_agreement_is_the_regression_of_dense_on_sparse_changes(pair, prompts, at):
    """Against the public context on the dense model, and a run of the sparse model with its channels changed."""
    found = intervention_agreement(pair, prompts, CHOSEN._replace(at=at))
    ids, other = prompts.pairs.input_ids, prompts.pairs.counterfactual_ids
    edits = [bridges.counterfactual(pair.sparse.model, "1.attn", c, ids, other) for c in CHOSEN.channels]
    change = written_addend(pair, whole_run(pair, prompts.pairs), CHOSEN._replace(at=at), "sparse")
    dense, sparse = [], []
    with torch.no_grad():
        plain = [odds(model(ids).logits, prompts.pairs) for model in (pair.dense.model, pair.sparse.model)]
        for strength in AGREEMENT_STRENGTHS:
            with bridges.steer(pair.dense.model, pair.bridge_set, edits, strength=strength, at=at):
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


def test_the_prompts_change_the_channels_whose_reads_differ_anywhere(pair, prompts):
    dz = whole_run(pair, prompts.pairs).dz[2]
    changed = changed_channels(pair, prompts, CHOSEN)
    assert changed.tolist() == [bool(dz[..., c].any()) for c in range(12)]
    same = Prompts(pair, toy_task().replaced(counterfactual_ids=toy_task().input_ids))
    assert not changed_channels(pair, same, CHOSEN).any()


def test_controls_are_other_channels_that_the_prompts_change():
    changed = torch.ones(12, dtype=torch.bool)
    changed[[5, 7]] = False
    drawn = control_channels(changed, (0, 3))
    assert len(drawn) == N_CONTROLS and len(set(drawn)) > 1
    assert all(len(set(one)) == 2 and not set(one) & {0, 3, 5, 7} for one in drawn)
    assert drawn == control_channels(changed, (0, 3)) and changed.sum() == 10
    assert control_channels(changed, tuple(range(7))) == []  # four others are left


def test_without_enough_other_channels_there_is_no_control(pair, prompts):
    """Width 12: seven channels leave five."""
    found = intervention_agreement(pair, prompts, CHOSEN._replace(channels=tuple(range(7))))
    assert found.r_squared_shuffled is None and "shuffled channels none" in str(found)


def test_answers_of_probability_zero_stay_finite():
    pairs = toy_task(rows=2)
    logits = torch.full((2, 17), -2000.0, dtype=torch.float64)
    logits[..., 0] = 0.0
    assert log_odds(logits, pairs).isfinite().all()


def test_slope_and_r_squared_are_those_of_the_regression_written_out():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    y = 2 * x + 0.5 * torch.randn(4, 5, generator=generator, dtype=torch.float64) + 3
    slope, r_squared = least_squares(x, y)
    dx, dy = (values.flatten() - values.mean() for values in (x, y))
    assert slope == pytest.approx((dx @ dy / (dx @ dx)).item(), rel=1e-12)
    assert r_squared == pytest.approx((1 - (dy - slope * dx).square().sum() / (dy @ dy)).item(), rel=1e-12)


@pytest.mark.parametrize("x", [torch.ones(3), torch.tensor([0.0, 1e-7, -1e-7])])
def test_changes_within_rounding_explain_nothing(x):
    assert least_squares(x, torch.arange(3.0)) == least_squares(torch.arange(3.0), x) == (0.0, 0.0)


def test_a_model_agrees_with_itself():
    """The dense model as its own sparse one, bridges of identity: the same edit does the same."""
    model = gpt2()
    pair = with_units(join(model, gpt2(), k=8))
    with torch.no_grad():
        for bridge in pair.bridge_set:
            bridge.decoder_weight.copy_(torch.eye(8))
            bridge.rms_dense.copy_(bridge.rms_sparse)
    prompts = Prompts(pair, toy_task())
    found = intervention_agreement(pair, prompts, Channels("0.mlp", (1,), "residual"))
    assert found.slope == pytest.approx(1) and found.r_squared == pytest.approx(1) and found.sign == 1
    assert found.r_squared_shuffled < 0.9


def test_a_sparse_model_that_never_changes_has_no_sign(pair, prompts):
    """At the read the sparse model's edit is made of `dn`, the dense model's of `dz`."""

    class Still(Prompts):
        def runs(self, bridges):
            for run in super().runs(bridges):
                yield run._replace(dn={i: torch.zeros_like(dn) for i, dn in run.dn.items()})

    still = Still(pair, prompts.pairs)
    found = intervention_agreement(pair, still, CHOSEN._replace(at="read"))
    assert found.sign is None and found.r_squared == 0.0 and "same sign none" in str(found)
