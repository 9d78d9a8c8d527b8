"""The dense model's own directions against loops, on a tiny random pair in float64."""

import pytest
import torch
from pairs import toy_task
from whole import whole_run, written_addend, written_p

from bridges.channels.baselines import _probe, _unit, at_last_token, best_mean_difference, dense_directions
from bridges.channels.prompts import Channels
from bridges.channels.runs import Prompts
from bridges.steering.delta import run_streams

CHOSEN = Channels("1.attn", (0, 3), "residual")


@pytest.fixture(scope="module")
def prompts(pair):
    return Prompts(pair, toy_task(seed=5)), Prompts(pair, toy_task(seed=6))


@pytest.mark.parametrize("at", ["read", "residual"])
def test_dense_directions_are_the_mean_difference_and_a_probe_of_the_edited_tokens(pair, prompts, at):
    """Written out: the mean over the edited tokens; a probe that points to their counterfactuals."""
    chosen, pairs = CHOSEN._replace(at=at), prompts[0].pairs
    with torch.no_grad():
        difference, probe = dense_directions(pair, prompts[0], chosen)
        if at == "residual":
            shown, other = (pair.dense.trace(x).residuals[2] for x in (pairs.input_ids, pairs.counterfactual_ids))
        else:
            shown, other = (pair.dense.reads(x)[2] for x in (pairs.input_ids, pairs.counterfactual_ids))
    norm = written_addend(pair, whole_run(pair, pairs), chosen).norm(dim=-1)
    touched = norm > 1e-3 * norm.max()
    assert not touched[:, :2].any() and touched[:, 2:].any()
    for side in (0, 1):
        rows = [(shown[i, t], other[i, t]) for i in range(6) for t in range(7) if touched[i, t] and i % 2 == side]
        mean = sum(b - a for a, b in rows)
        assert torch.allclose(difference[side], mean / mean.norm())
        assert probe[side].norm() == pytest.approx(1)
        gaps = torch.stack([(b - a) @ probe[side] for a, b in rows])
        assert gaps.mean() > 0


def test_a_probe_points_from_one_cluster_to_the_other_and_is_zero_without_tokens():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    after = torch.randn(200, 5, generator=generator, dtype=torch.float64) + torch.tensor([0, 0, 3.0, 0, 0])
    direction = _unit(_probe(before, after))
    assert direction[2] > 0.9 and direction.norm() == pytest.approx(1)
    assert not _probe(before[:0], after[:0]).any()


def test_the_mean_difference_is_added_at_the_last_token_of_the_best_site(pair, prompts):
    pairs, other = prompts[0].pairs, prompts[1].pairs
    with torch.no_grad():
        site, found = best_mean_difference(pair.dense, prompts[0])
        shown, swapped = (pair.dense.trace(x).residuals for x in (pairs.input_ids, pairs.counterfactual_ids))
        scored = []
        for i in range(5):
            last = (swapped[i] - shown[i])[:, -1]
            vectors = torch.stack([last[0::2].mean(0), last[1::2].mean(0)])
            stream = shown[i].clone()
            stream[:, -1] += vectors[pairs.direction]
            logits = pair.dense.run_from(i, stream, pairs.input_ids)
            scored.append(written_p(logits, pairs.targets).mean().item())
    assert scored[site] == max(scored)
    last = (swapped[site] - shown[site])[:, -1]
    values = at_last_token(found, other, run_streams(pair.dense, other.input_ids, None, [site]))
    assert values.shape == shown[site].shape and not values[:, :-1].any()
    assert torch.allclose(values[1, -1], last[1::2].mean(0))
