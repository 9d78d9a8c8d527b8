"""What each curve of a sweep adds, and its confidence band, on a tiny random pair in float64."""

import numpy as np
import pytest
import torch
from pairs import toy_task

from bridges.channels.baselines import dense_directions
from bridges.channels.curves import RANDOM_DIRECTIONS, RESAMPLES, dense_addends, edit_curves, with_band
from bridges.channels.prompts import Channels, edit_addend, p_target, run_prompts
from bridges.steering.delta import edited_logits

CHOSEN = Channels("1.attn", (0, 3), "residual")


@pytest.fixture(autouse=True)
def no_grad():
    """As inside `sweep`."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def prompts(pair):
    return run_prompts(pair, toy_task(seed=5)), run_prompts(pair, toy_task(seed=6))


@pytest.mark.parametrize("at", ["read", "residual"])
def test_random_directions_mean_difference_and_probe_have_the_edits_norm_at_every_token(pair, prompts, at):
    chosen = CHOSEN._replace(at=at)
    addends = {name: list(values) for name, values in dense_addends(pair, *prompts, chosen).items()}
    (edit,) = addends.pop("p_target")
    addends.pop("p_target_all_channels")
    assert torch.equal(edit, edit_addend(pair, prompts[1], chosen))
    assert [len(values) for values in addends.values()] == [RANDOM_DIRECTIONS, 1, 1]
    for values in addends.values():
        for addend in values:
            assert torch.allclose(addend.norm(dim=-1), edit.norm(dim=-1))
            assert not torch.allclose(addend, edit)


def test_mean_difference_and_probe_are_added_by_task_order(pair, prompts):
    addends = dense_addends(pair, *prompts, CHOSEN)
    directions = dense_directions(pair, prompts[0], CHOSEN)
    norm = edit_addend(pair, prompts[1], CHOSEN).norm(dim=-1)
    for name, direction in zip(("mean_difference_equal_norm", "probe"), directions, strict=True):
        (addend,) = addends[f"p_target_{name}"]
        for row in range(6):
            assert torch.allclose(addend[row], norm[row][:, None] * direction[row % 2])


def test_random_directions_are_averaged_over(pair, prompts):
    curve = edit_curves(pair, *prompts, CHOSEN, (0.5, 1.0))["p_target_random_direction"]
    trace, addends = prompts[1].traces.dense, list(dense_addends(pair, *prompts, CHOSEN)["p_target_random_direction"])
    for strength, row in zip((0.5, 1.0), curve, strict=True):
        each = [edited_logits(pair.dense, trace, 2, strength * addend, "residual") for addend in addends]
        expected = sum(p_target(logits, prompts[1].pairs) for logits in each) / RANDOM_DIRECTIONS
        assert torch.allclose(row, expected, rtol=1e-12)


def test_a_band_is_the_middle_of_resampled_means():
    values = torch.randn(2, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curve = with_band(values)
    drawn = np.random.default_rng(0).integers(40, size=(RESAMPLES, 40))
    for row, mean, low, high in zip(values.numpy(), *curve, strict=True):
        means = sorted(row[indices].mean() for indices in drawn)
        assert mean == pytest.approx(row.mean())
        assert means[24] <= low <= means[25] and means[974] <= high <= means[975]
