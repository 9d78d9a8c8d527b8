from bridges.fitting.gradients import StepLosses
from bridges.fitting.progress import summary


def test_a_steps_losses_are_shown_as_means_over_sites():
    kls = {"kl_dense_to_sparse": {"final": 1.5}, "kl_sparse_to_dense": {"final": 2.5}}
    losses = StepLosses({"0.attn": 0.5, "final": 1.0}, {"0.attn": 0.25, "final": 0.25}, **kls, loss=6.0)
    assert summary(losses) == "loss 6.000 nmse 0.75/0.25 kl 1.50/2.50"
    losses.ce = 3.0
    assert summary(losses) == "loss 6.000 nmse 0.75/0.25 kl 1.50/2.50 ce 3.00"


def test_losses_without_a_site_are_shown_as_nan():
    losses = StepLosses({}, {}, {"final": 1.5}, {"final": 2.5}, loss=4.0)
    assert summary(losses) == "loss 4.000 nmse nan/nan kl 1.50/2.50"
