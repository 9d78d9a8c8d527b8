"""The best state: the objective on rows set aside, kept and given back."""

import math

import pytest
import torch
from pairs import MASK, gpt2, join, naive_losses, sparse_model, tokens

from bridges.fitting.checkpoint import Checkpoint, last_checkpoint, save_checkpoint
from bridges.fitting.gradients import Objective, Weights
from bridges.fitting.selection import KL_SITES, Selection, interval
from bridges.fitting.start import start_from_checkpoint

WEIGHTS = Weights(0.5, 1.5, 2.0, 1.0)


def selection(pair=None, batches=None, **settings):
    pair = pair or join(gpt2(), sparse_model())
    return Selection(pair, [(tokens(), MASK)] if batches is None else batches, Objective(WEIGHTS, **settings))


def test_the_objective_is_the_written_out_one():
    found = selection()
    with torch.no_grad():
        (encode, decode, to_sparse, to_dense), _ = naive_losses(found.pair, tokens(), MASK)
    expected = sum(
        (0.5 * (e + d) + 1.5 * s + 2.0 * t).item()
        for e, d, s, t in zip(encode, decode, to_sparse, to_dense, strict=True)
    ) / len(encode)
    assert found.measure() == pytest.approx(expected, rel=1e-10)


def test_it_does_not_depend_on_batches_and_processes():
    pair, ids = join(gpt2(), sparse_model()), tokens(6, 9)
    whole = selection(pair, [(ids, None)]).measure()
    assert selection(pair, [(ids[:1], None), (ids[1:], None)]).measure() == pytest.approx(whole, rel=1e-12)
    sums = []
    selection(pair, [(ids, None)], reduce=lambda t: sums.append(t.clone()) or t).measure()
    empty = selection(pair, [], reduce=lambda t: t + sums.pop(0))
    assert empty.measure() == pytest.approx(whole, rel=1e-12) and not sums


def test_the_kls_of_many_sites_are_those_of_a_few_evenly_spaced():
    found = selection(join(gpt2(layers=12), sparse_model(layers=12)))
    assert len(found.kl_sites) == KL_SITES and found.kl_sites[0] == 0 and found.kl_sites[-1] == 24
    gaps = {b - a for a, b in zip(found.kl_sites, found.kl_sites[1:], strict=False)}
    assert gaps <= {3, 4}
    assert selection(join(gpt2(layers=1), sparse_model(layers=1))).kl_sites == [0, 1, 2]


def test_the_best_state_is_kept_and_given_back_bit_for_bit():
    found = selection()
    states, values = [], []
    for step, noise in enumerate((0.0, 0.3, -0.3, 3.0)):
        if step:
            found.keep()
            with torch.no_grad():
                for p in found.pair.bridge_set.parameters():
                    p.add_(noise * torch.rand(p.shape, generator=torch.Generator().manual_seed(step)))
        values.append(found.observe(step))
        states.append({name: t.clone() for name, t in found.pair.bridge_set.tensors().items()})
    best = min(range(4), key=values.__getitem__)
    assert best != 3 and found.best.step == best
    assert found.best.summary() == {"step": best, "objective": values[best], "objective_at_start": values[0]}
    found.restore()
    for name, tensor in found.pair.bridge_set.tensors().items():
        assert torch.equal(tensor.nan_to_num(7), states[best][name].nan_to_num(7))


def test_an_objective_that_is_not_a_number_is_never_the_best():
    found = selection()
    found.measure = iter([3.0, math.nan, 2.0, math.nan]).__next__
    for step in range(4):
        found.observe(step)
    assert found.best[:3] == (2, 2.0, 3.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_first_objective_that_is_not_finite_is_refused(value):
    found = selection()
    found.measure = lambda: value
    with pytest.raises(FloatingPointError, match=f"training rows set aside is {value} before the first step"):
        found.observe(0)
    assert found.best is None


def test_a_stream_that_does_not_vary_and_rows_of_nothing_but_padding_are_no_reason_to_refuse():
    same = torch.full((2, 6), 3), torch.tensor([[1, 1, 0, 0, 0, 0]] * 2)
    assert math.isfinite(selection(batches=[same]).observe(0))
    assert math.isfinite(selection(batches=[(tokens(), torch.zeros_like(MASK))]).observe(0))


def test_a_best_state_that_json_could_not_hold_is_resumed_from_and_replaced(tmp_path):
    """As a run of an earlier version has saved it, whose objective was not finite."""
    found = selection()
    state = {"best": [2, math.nan, math.inf]}
    save_checkpoint(tmp_path, Checkpoint(3, state, {"bridges": found.pair.bridge_set.tensors()}))
    best = start_from_checkpoint(found.pair, last_checkpoint(tmp_path)).best
    assert best.step == 2 and math.isnan(best.objective) and math.isnan(best.start)
    resumed = Selection(found.pair, found.batches, found.objective, best)
    value = resumed.observe(4)
    assert math.isfinite(value) and (resumed.best.step, resumed.best.objective) == (4, value)


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (9, 1), (10, 1), (11, 2), (300, 30)])
def test_it_is_measured_about_ten_times(steps, every):
    assert interval(steps) == every


def test_a_bridge_of_nan_at_a_site_without_kls_spoils_the_objective():
    found = selection(join(gpt2(layers=12), sparse_model(layers=12)))
    hidden = next(i for i in range(25) if i not in found.kl_sites)
    with torch.no_grad():
        found.pair.bridge_set[hidden].decoder_bias[0] = math.nan
    assert math.isnan(found.measure())
