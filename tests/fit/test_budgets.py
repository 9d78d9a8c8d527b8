"""Budgets of tokens, and what a resumed run plans."""

from importlib import import_module

import pytest
import torch
from fits import DATA, outcome, raiser, run, shallow

from bridges.fitting.closed_form import DEFAULT_RIDGE
from bridges.models.loading import as_residual

fit_module = import_module("bridges.fit")


@pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": 2}, {"steps": 0, "ridge": 1e-3}, {"closed_form": False}])
def test_rows_padded_to_three_times_their_width_give_what_they_give_without_padding(settings, monkeypatch):
    """The budgets leave rows over, so that as many rows count only if padding does not."""
    monkeypatch.setattr(fit_module, "SELECTION_TOKENS", 8)
    monkeypatch.setattr(fit_module, "SAMPLED_TOKENS", 40)
    monkeypatch.setattr(fit_module, "STANDARDIZATION_TOKENS", 40)
    rows = DATA.repeat(5, 1)[:, :4]
    padded = {"input_ids": torch.zeros(60, 12).long(), "attention_mask": torch.zeros(60, 12).long()}
    padded["input_ids"][:, :4], padded["attention_mask"][:, :4] = rows, 1
    budgets = {"closed_form_tokens": 80, "eval_tokens": 8, **settings}
    one, other = (outcome(run(data, **budgets)) for data in (rows, padded))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_a_single_training_row_chooses_no_ridge():
    found = run(DATA[:1], eval_data=DATA[:4], steps=0)
    assert list(found.provenance["ridge"].values()) == [[DEFAULT_RIDGE, DEFAULT_RIDGE]] * 3


def test_few_tokens_for_the_closed_form_still_choose_a_ridge_on_a_row():
    found = run(closed_form_tokens=7, steps=0)
    assert any(ridge != DEFAULT_RIDGE for ridges in found.provenance["ridge"].values() for ridge in ridges)


def test_a_token_that_is_not_finite_among_the_rows_set_aside_stops_the_run():
    dense = as_residual(shallow())
    with torch.no_grad():
        dense.model.transformer.wte.weight[12] = float("nan")
    data = DATA.masked_fill(DATA == 12, 1)
    data[10, 4] = 12  # of 12 rows the last is held out, and the one before set aside
    with pytest.raises(FloatingPointError, match=r"not finite on the training rows set aside"):
        run(data, dense=dense)
    with pytest.raises(FloatingPointError, match=r"the objective on the training rows set aside is nan"):
        run(data, dense=dense, closed_form=False)


def test_a_resumed_run_plans_the_steps_that_are_left(tmp_path, monkeypatch, capsys):
    settings = {"output_dir": tmp_path, "checkpoint_every": 2, "progress": True}
    monkeypatch.setattr(fit_module, "measure", raiser(SystemExit))
    with pytest.raises(SystemExit):
        run(**settings, steps=5, eval_every=4)
    assert "closed form from" in (shown := capsys.readouterr().err) and "then 5 steps" in shown
    monkeypatch.undo()
    run(**settings, steps=5, eval_every=4, resume=True)
    shown = capsys.readouterr().err
    assert "resumes at step 2, then 3 steps" in shown and "closed form" not in shown
