"""Curves and their baselines, on a tiny random pair in float64."""

import json
import math

import pytest
import torch
from pairs import tokens, toy_task
from whole import whole_run, written_p, written_p_target

from bridges.channels.find import find, find_channels
from bridges.channels.prompts import Channels
from bridges.channels.reference_text import sample_text
from bridges.channels.runs import Prompts
from bridges.channels.search import NoChannelsFoundError, SearchOptions
from bridges.channels.sweep import sweep, sweep_prompts
from bridges.report.curves import BASELINES, CURVES

CHOSEN = Channels("1.attn", (0, 3), "residual")
TEXT = tokens()
TASK = toy_task(rows=70)
"""64 pairs to choose on, and six to report."""
ONE_TASK_ORDER = toy_task(rows=66).replaced(direction=torch.zeros(66).long())


@pytest.fixture(scope="module")
def models(pair):
    return pair.dense.model, pair.sparse.model, pair.bridge_set


@pytest.fixture(scope="module")
def prompts(pair):
    return Prompts(pair, toy_task(seed=5)), Prompts(pair, toy_task(seed=6))


def test_found_channels_are_swept_as_they_are(pair):
    found = find_channels(pair.dense, pair.sparse, pair.bridge_set, TASK, candidates=8, text=TEXT, budget=math.inf)
    result = sweep(pair.dense, pair.sparse, pair.bridge_set, TASK, found, (1.0,), text=TEXT)
    assert result.chosen == found.best and result.ranking_agreement == found.agreement


def test_every_curve_starts_at_the_unedited_model(pair, prompts):
    result = sweep_prompts(pair, *prompts, CHOSEN, (0.0, 0.5, 1.0), TEXT)
    run = whole_run(pair, prompts[1].pairs)
    plain, in_sparse = (written_p(trace.logits, run.pairs.targets).mean().item() for trace in run.traces)
    assert list(result.curves) == list(CURVES)
    for name, curve in result.curves.items():
        start = in_sparse if name == "p_target_sparse_model" else plain
        assert len(curve.mean) == 3 and curve.mean[0] == pytest.approx(start, rel=1e-9), name
        assert curve.mean[2] != pytest.approx(start, rel=1e-6), name
        assert all(low <= mean <= high for low, mean, high in zip(curve.low, curve.mean, curve.high, strict=True))
    for strength, mean in zip((0.0, 0.5, 1.0), result.curves["p_target"].mean, strict=True):
        assert mean == pytest.approx(written_p_target(pair, run, CHOSEN, strength).mean().item())
    p = written_p_target(pair, run, CHOSEN)
    assert result.p_target_by_direction == pytest.approx([p[0::2].mean().item(), p[1::2].mean().item()])
    assert result.prompts == 6 and result.ranking_agreement is None


def test_all_channels_at_the_last_site_is_one_affine_push(pair, prompts):
    """At `final` there is nothing after the edit but the head, so the curve can be computed by hand."""
    run = whole_run(pair, prompts[1].pairs)
    result = sweep_prompts(pair, *prompts, Channels("final", (1,), "residual"), (1.0,), TEXT)
    stream = run.traces.dense.residuals[-1] + run.dz[4] @ pair.bridge_set[4].decoder_weight.T
    model = pair.dense.model
    with torch.no_grad():
        logits = model.lm_head(model.transformer.ln_f(stream))
    expected = written_p(logits, run.pairs.targets).mean().item()
    assert result.curves["p_target_all_channels"].mean[0] == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, 1, 5, 40])
def test_channels_are_searched_for_on_the_first_pairs_and_on_text_that_is_not_reported_on(pair, models, rows):
    text = None if rows is None else tokens(rows, 9)
    result = sweep(*models, TASK, 2, (1.0,), by="both", budget=0.3, seed=5, text=text)
    all_text = sample_text(pair, 5, for_search=False) if text is None else text
    n_search = {None: 0, 1: 0, 5: 2, 40: 16}[rows]
    search_text = all_text[:n_search] if n_search else sample_text(pair, 5)
    found = find(pair, Prompts(pair, TASK.rows(0, 64)), search_text, SearchOptions(2, "both", 0.3))
    assert result.chosen == found.best and result.ranking_agreement == found.agreement
    assert result.effects.tokens == all_text[n_search:].numel()


def test_a_search_that_finds_nothing_says_so(models):
    """Where the counterfactuals are the prompts themselves, no edit changes anything."""
    task = TASK.replaced(counterfactual_ids=TASK.input_ids)
    with pytest.raises(NoChannelsFoundError, match=r"task='toy': none of the \d+ channels tried raises P\(target\)"):
        sweep(*models, task, 2, (1.0,), text=TEXT)


def test_it_saves_draws_and_prints_its_figures(models, tmp_path):
    result = sweep(*models, TASK, CHOSEN, (0.0, 1.0), text=tokens(3, 9))
    assert result.prompts == 6 and result.effects.tokens == 27
    result.save(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    assert content == result.to_dict()
    assert content["channel"] == [0, 3] and content["site"] == "1.attn" and content["strengths"] == [0.0, 1.0]
    for name in CURVES:
        assert content[name] == result.curves[name].mean
        assert content["bands"][name] == {"low": result.curves[name].low, "high": result.curves[name].high}
    assert result.plot(tmp_path / "s.png") == tmp_path / "s.png"
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    text = str(result)
    assert "channels [0, 3] at 1.attn (residual)" in text and f"KL {result.effects.kl:.3f} nats" in text
    for name, style in BASELINES.items():
        assert f"{style.label:<62} {content[name][0]:.3f} -> {content[name][1]:.3f}" in text


def test_one_channel_is_a_number_and_text_is_sampled_where_none_is_given(models):
    result = sweep(*models, TASK, Channels("1.attn", (3,), "read"), (1.0,))
    assert result.to_dict()["channel"] == 3 and result.ranking_agreement is None
    assert result.effects.tokens == 16 * 12  # 16 rows as long as the model's context


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (CHOSEN._replace(site="9.attn"), r"site='9\.attn' has no bridge; there are 0\.attn"),
        (CHOSEN._replace(channels=(2, 12)), "channel=12 must lie between 0 and 11"),
        (CHOSEN._replace(channels=()), r"channels=\(\) must be a tuple of different channels"),
        (CHOSEN._replace(at="foo"), "at='foo' must be one of read, residual"),
    ],
)
def test_channels_that_do_not_exist_are_refused(pair, prompts, unchecked, chosen, message):
    with pytest.raises(ValueError, match=message):
        sweep_prompts(pair, *prompts, chosen, (1.0,), TEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "sparse"}, "by='sparse' must be one of dense, both"),
        ({"budget": -0.1}, r"budget=-0\.1 must be 0 nats or more; use inf for no limit"),
        ({"budget": float("nan")}, "budget=nan must be 0"),
        ({"budget": "0.1"}, "budget='0.1' must be 0"),
    ],
)
def test_settings_of_the_search_are_checked_where_channels_are_given_too(pair, unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(pair.dense.model, pair.sparse.model, pair.bridge_set, toy_task(rows=70), CHOSEN, (1.0,), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": ()}, r"strengths=\(\) must be a list of finite numbers"),
        ({"strengths": (float("nan"),)}, r"strengths=\(nan,\) must be a list of finite"),
        ({"strengths": 0.5}, "strengths=0.5 must be a list"),
        ({"strengths": torch.tensor([0.0, float("inf")])}, "must be a list of finite"),
        ({"channels": "0.mlp"}, "channels='0.mlp' must be bridges.Channels, what find_channels returned, or how many"),
        ({"channels": (("0.mlp", 1),)}, "must be bridges.Channels"),
        ({"channels": 9}, "channels=9 must be a whole number between 1 and 8"),
        ({"text": torch.zeros(4, 1).long()}, r"text has rows of 1 real token\(s\)"),
        ({"task": ONE_TASK_ORDER}, r"task needs both task orders \(direction 0 and 1\) in its first 64 pairs"),
        ({"n": 0}, "n=0 must be at least 2 prompts"),
        ({"task": toy_task(rows=12)}, "task has 12 pairs; give 64 to choose channels on and 2 or more"),
    ],
)
def test_an_argument_out_of_range_is_refused(pair, unchecked, options, message):
    options = {"task": toy_task(rows=66), "channels": CHOSEN, **options}
    with pytest.raises(ValueError, match=message):
        sweep(pair.dense.model, pair.sparse.model, pair.bridge_set, **options)
