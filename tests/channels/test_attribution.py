"""First-order effects against central differences, on a tiny random pair in float64."""

import pytest
import torch
from pairs import gpt2, join, sparse_model, toy_task, with_units
from whole import whole_run, written_p_target

from bridges.channels.attribution import _gradients, log_probability, predicted_effects
from bridges.channels.prompts import Channels
from bridges.channels.runs import Prompts


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


@pytest.mark.parametrize("side", ["dense", "sparse"])
def test_effects_in_half_precision_models_are_added_up_in_full_precision(side):
    pair = with_units(join(gpt2(dtype=torch.bfloat16), sparse_model(dtype=torch.bfloat16)))
    prompts = Prompts(pair, toy_task(rows=40))
    found = predicted_effects(pair, prompts, side)
    (run,) = prompts.runs(range(len(pair.bridge_set)))
    gradients = _gradients(pair.model(side), run.side(side).context, run.pairs, len(prompts))
    for (i, at), effects in found.items():
        gradient, bridge = gradients[at][pair.site(side, i)].double(), pair.bridge_set[i]
        dn = run.dn[i][:, -gradient.shape[1] :].double()  # the read at `final` is that of the last token
        dz = dn * bridge.rms_sparse / bridge.gain_sparse
        if side == "sparse":
            expected = (gradient * (dz if at == "residual" else dn)).sum((0, 1))
        else:
            norm = pair.dense.norm(pair.site("dense", i))
            if at == "read":
                gradient = norm.gain.double() * gradient / bridge.rms_dense
                gradient = gradient - gradient.mean(-1, keepdim=True)
            expected = ((gradient @ bridge.decoder_weight.detach().double()) * dz).sum((0, 1))
        assert effects.dtype == torch.float64
        torch.testing.assert_close(effects, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
