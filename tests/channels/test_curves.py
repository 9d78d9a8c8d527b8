"""What each curve of a sweep adds, and its confidence band, on a tiny random pair in float64."""

import tracemalloc

import numpy as np
import pytest
import torch
from pairs import toy_task
from whole import whole_run, written_addend, written_logits, written_p

from bridges.channels import curves
from bridges.channels.baselines import dense_directions
from bridges.channels.curves import (
    RANDOM_DIRECTIONS,
    RESAMPLES,
    dense_addends,
    edit_curves,
    n_random_directions,
    with_band,
)
from bridges.channels.prompts import Channels
from bridges.channels.runs import Prompts
from bridges.steering.delta import random_addends

CHOSEN = Channels("1.attn", (0, 3), "residual")


@pytest.fixture(autouse=True)
def no_grad():
    """As inside `sweep`."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def prompts(pair):
    return Prompts(pair, toy_task(seed=5)), Prompts(pair, toy_task(seed=6))


FIRST = 2
"""The first token that the prompts of a pair differ in."""


def addends_of_all(pair, prompts, chosen):
    """The addends on all reported prompts, which are one batch, from the first token that a pair differs in."""
    (run,) = prompts[1].runs([pair.bridge_set.index(chosen.site)])
    assert run.rows.tolist() == list(range(6))
    directions = dense_directions(pair, prompts[0], chosen)
    return {name: list(values) for name, values in dense_addends(pair, run, chosen, directions).items()}


@pytest.mark.parametrize("at", ["read", "residual"])
def test_random_directions_mean_difference_and_probe_have_the_edits_norm_at_every_token(pair, prompts, at):
    chosen = CHOSEN._replace(at=at)
    addends = addends_of_all(pair, prompts, chosen)
    (edit,) = addends.pop("p_target")
    addends.pop("p_target_all_channels")
    written = written_addend(pair, whole_run(pair, prompts[1].pairs), chosen)
    assert torch.allclose(edit, written[:, FIRST:], rtol=1e-12, atol=1e-14) and not written[:, :FIRST].any()
    assert [len(values) for values in addends.values()] == [RANDOM_DIRECTIONS, 1, 1]
    for values in addends.values():
        for addend in values:
            assert torch.allclose(addend.norm(dim=-1), edit.norm(dim=-1))
            assert not torch.allclose(addend, edit)


def test_mean_difference_and_probe_are_added_by_task_order(pair, prompts):
    addends = addends_of_all(pair, prompts, CHOSEN)
    directions = dense_directions(pair, prompts[0], CHOSEN)
    norm = written_addend(pair, whole_run(pair, prompts[1].pairs), CHOSEN).norm(dim=-1)[:, FIRST:]
    for name, direction in zip(("mean_difference_equal_norm", "probe"), directions, strict=True):
        (addend,) = addends[f"p_target_{name}"]
        for row in range(6):
            assert torch.allclose(addend[row], norm[row][:, None] * direction[row % 2])


def test_random_directions_are_averaged_over(pair, prompts):
    curve = edit_curves(pair, *prompts, CHOSEN, (0.5, 1.0))["p_target_random_direction"]
    run = whole_run(pair, prompts[1].pairs)
    addends = list(random_addends(written_addend(pair, run, CHOSEN), RANDOM_DIRECTIONS, seed=1))
    for strength, row in zip((0.5, 1.0), curve, strict=True):
        each = [written_logits(pair, run, CHOSEN, strength, addend=addend) for addend in addends]
        expected = sum(written_p(logits, run.pairs.targets) for logits in each) / RANDOM_DIRECTIONS
        assert torch.allclose(row, expected, rtol=1e-10)


def test_there_are_fewer_random_directions_in_a_large_model(pair, prompts, monkeypatch):
    model, work = pair.dense, sum(p.numel() for p in pair.dense.model.parameters()) * 42 * 3  # tokens, strengths
    for affordable, expected in {1: 4, 4: 4, 7: 7, 20: 20, 21: 20}.items():
        monkeypatch.setattr(curves, "RANDOM_WORK", (affordable + 0.5) * work)
        assert n_random_directions(model, prompts[1], 3) == expected
    monkeypatch.setattr(curves, "RANDOM_WORK", 5.5 * work)
    found = edit_curves(pair, *prompts, CHOSEN, (0.0, 0.5, 1.0))["p_target_random_direction"]
    run = whole_run(pair, prompts[1].pairs)
    addends = random_addends(written_addend(pair, run, CHOSEN), 5, seed=1)
    each = [written_p(written_logits(pair, run, CHOSEN, addend=addend), run.pairs.targets) for addend in addends]
    assert torch.allclose(found[2], sum(each) / 5, rtol=1e-10)


def test_a_band_is_the_middle_of_resampled_means():
    values = torch.randn(2, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curve = with_band(values)
    drawn = np.random.default_rng(0).integers(40, size=(RESAMPLES, 40))
    for row, mean, low, high in zip(values.numpy(), *curve, strict=True):
        means = sorted(row[indices].mean() for indices in drawn)
        assert mean == pytest.approx(row.mean())
        assert means[24] <= low <= means[25] and means[974] <= high <= means[975]


def test_a_band_is_the_same_whatever_memory_it_may_take(monkeypatch):
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = with_band(values)
    for n_bytes in (1, 7 * 4 * 40 * 8):
        monkeypatch.setattr(curves, "RESAMPLED_BYTES", n_bytes)
        assert with_band(values) == whole


def test_memory_of_a_band_does_not_grow_with_prompts_times_resamples():
    values = torch.rand(11, 2000, generator=torch.Generator().manual_seed(0))
    with_band(values[:, :10])  # imports
    tracemalloc.start()
    with_band(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * curves.RESAMPLED_BYTES < 11 * 2000 * 8 * RESAMPLES  # one batch goes as the next one comes
