"""First-order effects against central differences, on a tiny random pair in float64."""

import pytest
import torch

from bridges.channels.attribution import mean_log, predicted_effects
from bridges.channels.prompts import Channels, edit_addend, p_target
from bridges.steering.delta import edited_logits


@pytest.mark.parametrize("side", ["dense", "sparse"])
def test_predicted_effects_are_the_derivative_of_log_p(pair, prompts, side):
    """For the two channels of largest effect at every site and entry point."""
    model, trace = pair.model(side), prompts.traces.side(side)
    predicted = predicted_effects(pair, prompts, side)
    assert len(predicted) == 2 * len(pair.bridge_set)
    for (i, at), effects in predicted.items():
        for channel in effects.abs().topk(2).indices.tolist():
            chosen = Channels(pair.bridge_set.sites[i], (channel,), at)
            addend = 1e-6 * edit_addend(pair, prompts, chosen, side)
            with torch.no_grad():
                ends = [edited_logits(model, trace, pair.site(side, i), sign * addend, at) for sign in (1, -1)]
            up, down = (p_target(logits, prompts.pairs).log().mean() for logits in ends)
            assert abs(effects[channel] - (up - down) / 2e-6) < 1e-4 * effects[channel].abs() + 1e-6


def test_a_probability_of_zero_leaves_predictions_finite():
    p = torch.tensor([0.0, 0.5], requires_grad=True)
    mean_log(p).backward()
    assert mean_log(p).isfinite() and p.grad.isfinite().all() and p.grad[1] == 1
