"""Curves and their baselines, on a tiny random pair in float64."""

import json
import sys

import numpy as np
import pytest
import torch
from pairs import tokens, toy_task

from bridges.channels.find import find, find_channels
from bridges.channels.prompts import Channels, addend_of, edited, p_target, prompts_of, text_of
from bridges.channels.search import sampled
from bridges.channels.sweep import BASELINES, RANDOM_DIRECTIONS, _banded, sweep, sweep_prompts
from bridges.steering.delta import edited_logits

MODULE = sys.modules["bridges.channels.sweep"]  # the package's attribute of that name is the function
CHOSEN = Channels("1.attn", (0, 3), "residual")


TEXT = tokens()
ONE_WAY = toy_task(rows=66)._replace(direction=torch.zeros(66).long())


@pytest.fixture(scope="module")
def prompts(pair):
    return prompts_of(pair, toy_task(seed=5)), prompts_of(pair, toy_task(seed=6))


def test_what_was_found_is_taken_as_it_is(pair):
    task = toy_task(rows=70)
    found = find_channels(pair.dense, pair.sparse, pair.bridge_set, task, candidates=8, text=TEXT)
    result = sweep(pair.dense, pair.sparse, pair.bridge_set, task, found, (1.0,), text=TEXT)
    assert result.chosen == found.best and result.ranking_agreement == found.agreement


def test_every_curve_starts_at_the_unedited_model(pair, prompts):
    result = sweep_prompts(pair, *prompts, CHOSEN, (0.0, 0.5, 1.0), TEXT)
    reported = prompts[1]
    plain = p_target(reported.traces.dense.logits, reported.pairs).mean().item()
    inside = p_target(reported.traces.sparse.logits, reported.pairs).mean().item()
    assert result.curves.keys() == {"p_target", *BASELINES}
    for name, curve in result.curves.items():
        start = inside if name == "p_target_sparse_model" else plain
        assert len(curve.mean) == 3 and curve.mean[0] == pytest.approx(start, rel=1e-9), name
        assert curve.mean[2] != pytest.approx(start, rel=1e-6), name
        assert all(low <= mean <= high for low, mean, high in zip(curve.low, curve.mean, curve.high, strict=True))
    for strength, mean in zip((0.0, 0.5, 1.0), result.curves["p_target"].mean, strict=True):
        assert mean == pytest.approx(edited(pair, reported, CHOSEN, strength).mean().item())
    p = edited(pair, reported, CHOSEN)
    assert result.p_target_by_direction == pytest.approx([p[0::2].mean().item(), p[1::2].mean().item()])
    assert result.prompts == 6 and result.ranking_agreement is None


@pytest.mark.parametrize("at", ["read", "residual"])
def test_baselines_have_the_edits_norm_at_every_token(pair, prompts, at, monkeypatch):
    added = []

    def noted(model, trace, site, addend, at):
        added.append((model, addend.norm(dim=-1)))
        return edited_logits(model, trace, site, addend, at)

    monkeypatch.setattr(MODULE, "edited_logits", noted)
    chosen = CHOSEN._replace(at=at)
    sweep_prompts(pair, *prompts, chosen, (1.0,), TEXT)
    norm = addend_of(pair, prompts[1], chosen).norm(dim=-1)
    equal = [n for model, n in added if model is pair.dense and n.shape == norm.shape and torch.allclose(n, norm)]
    assert len(equal) >= 1 + RANDOM_DIRECTIONS + 2  # the edit, random directions, mean difference, probe


def test_all_channels_at_the_last_site_is_one_affine_push(pair, prompts):
    """At `final` there is nothing after the edit but the head, so the curve can be computed by hand."""
    reported = prompts[1]
    result = sweep_prompts(pair, *prompts, Channels("final", (1,), "residual"), (1.0,), TEXT)
    stream = reported.traces.dense.residuals[-1] + reported.dz[4] @ pair.bridge_set[4].decoder_weight.T
    model = pair.dense.model
    with torch.no_grad():
        logits = model.lm_head(model.transformer.ln_f(stream))
    expected = p_target(logits, reported.pairs).mean().item()
    assert result.curves["p_target_all_channels"].mean[0] == pytest.approx(expected)


def test_bands_cover_the_middle_of_resampled_means():
    values = torch.randn(2, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curve = _banded(values)
    for mean, low, high, row in zip(*curve, values, strict=True):
        assert mean == pytest.approx(row.mean().item())
        half = 1.96 * row.std().item() / np.sqrt(400)  # what the central limit theorem says
        assert low == pytest.approx(mean - half, abs=0.02) and high == pytest.approx(mean + half, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, 1, 5, 40])
def test_channels_are_searched_for_on_the_first_prompts_and_on_text_of_their_own(pair, monkeypatch, rows):
    monkeypatch.setattr(MODULE, "CHOSEN_ON", 4)
    models = pair.dense.model, pair.sparse.model, pair.bridge_set
    task, text = toy_task(rows=12), None if rows is None else tokens(rows, 9)
    result = sweep(*models, task, 2, (1.0,), by="both", budget=0.3, seed=5, text=text)
    shared = sampled(pair, 5, search=False) if text is None else text
    taken = {None: 0, 1: 0, 5: 2, 40: 16}[rows]
    elsewhere = shared[:taken] if taken else sampled(pair, 5)
    found = find(pair, prompts_of(pair, task.rows(0, 4)), text_of(pair, elsewhere), 2, "both", 0.3)
    assert result.chosen == found.best and result.ranking_agreement == found.agreement
    assert result.effects.tokens == shared[taken:].numel()


def test_it_saves_draws_and_prints_what_it_found(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "CHOSEN_ON", 4)
    models = pair.dense.model, pair.sparse.model, pair.bridge_set
    result = sweep(*models, toy_task(rows=12), CHOSEN, (0.0, 1.0), text=tokens(3, 9))
    assert result.prompts == 8 and result.effects.tokens == 27
    result.save(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    assert content == result.to_dict()
    assert content["channel"] == [0, 3] and content["site"] == "1.attn" and content["strengths"] == [0.0, 1.0]
    for name in ("p_target", *BASELINES):
        assert content[name] == result.curves[name].mean
        assert content["bands"][name] == {"low": result.curves[name].low, "high": result.curves[name].high}
    result.plot(tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    text = str(result)
    assert "channels [0, 3] at 1.attn (residual)" in text and all(label in text for label in BASELINES.values())
    assert f"KL {result.effects.kl:.3f} nats" in text
    one = sweep(*models, toy_task(rows=12), Channels("1.attn", (3,), "read"), (1.0,))
    assert one.to_dict()["channel"] == 3
    assert one.effects.tokens == 16 * 12  # rows sampled from the dense model, as long as its context


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (CHOSEN._replace(site="9.attn"), r"site='9\.attn' has no bridge; there are 0\.attn"),
        (CHOSEN._replace(channels=(2, 12)), "channel=12 must lie between 0 and 11"),
        (CHOSEN._replace(channels=()), r"channels=\(\) must be a tuple of different channels"),
        (CHOSEN._replace(at="foo"), "at='foo' must be one of read, residual"),
    ],
)
def test_what_cannot_be_is_refused(pair, prompts, unchecked, chosen, message):
    with pytest.raises(ValueError, match=message):
        sweep_prompts(pair, *prompts, chosen, (1.0,), TEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "sparse"}, "by='sparse' must be one of dense, both"),
        ({"budget": -0.1}, r"budget=-0\.1 must be 0 nats or more; infinity takes any channel"),
        ({"budget": float("nan")}, "budget=nan must be 0"),
        ({"budget": "0.1"}, "budget='0.1' must be 0"),
    ],
)
def test_how_to_search_is_checked_where_channels_are_given_too(pair, unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(pair.dense.model, pair.sparse.model, pair.bridge_set, toy_task(rows=12), CHOSEN, (1.0,), **options)


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
        ({"task": ONE_WAY}, "task holds pairs of one way round among its first 64 or after them"),
        ({"n": 0}, "n=0 must be at least 2 prompts"),
        ({"task": toy_task(rows=12)}, "task has 12 pairs; give 64 to choose channels on and 2 or more"),
    ],
)
def test_what_is_not_enough_is_refused(pair, unchecked, options, message):
    options = {"task": toy_task(rows=66), "channels": CHOSEN, **options}
    with pytest.raises(ValueError, match=message):
        sweep(pair.dense.model, pair.sparse.model, pair.bridge_set, **options)
