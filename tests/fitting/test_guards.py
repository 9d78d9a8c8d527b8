"""What stops a run: each figure that is not finite, by name, and Ctrl-C."""

import math
import os
import signal
import threading
import warnings
from dataclasses import MISSING, fields

import pytest
import torch

from bridges.bridge_report import BridgeReport, SiteFigures
from bridges.fitting.gradients import SITE_LOSSES, StepLosses
from bridges.fitting.guards import (
    interruptible,
    largest_gradient,
    refuse_not_finite,
    warn_of_poor_sites,
)


@pytest.mark.parametrize("name", SITE_LOSSES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused_by_step_name_and_site(name, value):
    losses = StepLosses(**{name: {"0.attn": 1.0, "1.mlp": value}})
    with pytest.raises(FloatingPointError, match=rf"step 7: {name} at site 1\.mlp is {value}.*Lower lr"):
        refuse_not_finite(losses, 7)


def test_a_cross_entropy_that_is_not_finite_is_refused_and_large_losses_are_not():
    with pytest.raises(FloatingPointError, match="step 3: the sparse model's cross-entropy is nan; lower sparse_lr"):
        refuse_not_finite(StepLosses(ce=math.nan), 3)
    refuse_not_finite(StepLosses(nmse_encode={"0.attn": 1e30}, ce=0.0), 3)
    refuse_not_finite(StepLosses(ce=None), 3)


def test_a_gradient_that_is_not_finite_is_refused():
    refuse_not_finite(StepLosses(largest_gradient=1e30), 5)
    for value in (math.inf, math.nan):
        with pytest.raises(FloatingPointError, match="step 5: a gradient is not finite though the losses are"):
            refuse_not_finite(StepLosses(largest_gradient=value), 5)
    with pytest.raises(FloatingPointError, match="step 5: nmse_encode at site final is nan"):
        refuse_not_finite(StepLosses(nmse_encode={"final": math.nan}, largest_gradient=math.nan), 5)


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_the_largest_gradient_is_not_finite_where_one_is_not(bad):
    one, other = torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True, dtype=torch.float64)
    one.grad, other.grad = torch.tensor([1.0, -4.0]), torch.tensor([3.0, 2.0, 0.0]).double()
    assert largest_gradient([one, torch.zeros(2), other]) == 4 and largest_gradient([]) == 0
    other.grad[1] = bad
    assert not largest_gradient([one, other]).isfinite()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_the_event_and_restores_the_handlers(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with interruptible() as interrupted:
        assert not interrupted.is_set() and signal.getsignal(number) is not before[number]
        os.kill(os.getpid(), number)
        assert interrupted.wait(5)
        assert {n: signal.getsignal(n) for n in before} == before  # a second one acts at once
    assert {n: signal.getsignal(n) for n in before} == before


def test_handlers_are_restored_after_an_error_and_other_threads_set_none():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), interruptible():
        raise KeyError
    assert signal.getsignal(signal.SIGINT) is before
    found = []

    def run():
        with interruptible() as interrupted:
            found.append((interrupted.is_set(), signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(False, True)]


def test_an_empty_gradient_is_left_out():
    """That of a tensor whose every entry is zero, where zeros stay zero."""
    empty, one = (torch.nn.Parameter(torch.zeros(n)) for n in (0, 2))
    empty.grad, one.grad = torch.zeros(0), torch.ones(2)
    assert largest_gradient([empty, one]) == 1 and largest_gradient([empty]) == 0


def figures(name, encode, decode, floor=0.1):
    others = dict.fromkeys(f.name for f in fields(SiteFigures) if f.default is MISSING)
    values = dict.fromkeys(others, 0.5) | {"name": name, "nmse_encode": encode, "nmse_decode": decode}
    return SiteFigures(**values | {"nmse_encode_floor": floor})


def test_sites_worse_than_the_mean_are_named_together_with_the_likely_reason():
    sites = (figures("0.attn", 1.5, 0.2), figures("0.mlp", 2.5, 3.0, floor=2.0), figures("final", 1.2, 1.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_poor_sites(BridgeReport(sites, 1.0, 1.0, 1.0, 10))
    texts = [str(one.message) for one in caught]
    assert len(texts) == 3
    assert "nmse_encode is over 1, worse than predicting the mean, at 0.mlp (2.5); AbsTopK alone" in texts[0]
    assert "at 0.attn (1.5), final (1.2); there are too few" in texts[1]
    assert "nmse_decode is over 1, worse than predicting the mean, at 0.mlp (3)" in texts[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_poor_sites(BridgeReport((figures("0.attn", 1.0, math.nan),), 1.0, 1.0, 1.0, 10))
