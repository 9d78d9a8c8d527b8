"""First-order effects against central differences, on a tiny random pair in float64."""

import pytest
import torch
from whole import whole_run, written_p_target

from bridges.channels.attribution import log_probability, predicted_effects
from bridges.channels.prompts import Channels


@pytest.mark.parametrize("side", ["dense", "sparse"])
def test_predicted_effects_are_the_derivative_of_log_p(pair, prompts, side):
    """For the two channels of largest effect at every site and entry point."""
    run = whole_run(pair, prompts.pairs)
    predicted = predicted_effects(pair, prompts, side)
    assert len(predicted) == 2 * len(pair.bridge_set)
    for (i, at), effects in predicted.items():
        for channel in effects.abs().topk(2).indices.tolist():
            chosen = Channels(pair.bridge_set.sites[i], (channel,), at)
            up, down = (written_p_target(pair, run, chosen, s, side).log().mean() for s in (1e-6, -1e-6))
            assert abs(effects[channel] - (up - down) / 2e-6) < 1e-4 * effects[channel].abs() + 1e-6


def test_a_probability_of_zero_leaves_predictions_finite():
    p = torch.tensor([0.0, 0.5], requires_grad=True)
    log_probability(p).mean().backward()
    assert log_probability(p).isfinite().all() and p.grad.isfinite().all() and p.grad[1] == 1
