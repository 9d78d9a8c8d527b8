import math
from functools import partial

import pytest
import torch

from bridges.ops import kl
from bridges.ops.kl import kl_divergence, kl_divergence_eager

TWINS = [kl_divergence, kl_divergence_eager]
INF = float("inf")


def random_pair(n, v, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n * v)
    return tuple((3 * torch.randn(n, v, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2))


def value_and_gradient(function, target, logits, upstream=1.0):
    logits = logits.clone().requires_grad_()
    value = function(target, logits)
    (upstream * value).backward()
    return value.detach(), logits.grad


@pytest.mark.parametrize("function", TWINS)
def test_two_tokens_by_hand(function):
    target, logits = torch.tensor([[math.log(3.0), 0.0]]).double(), torch.zeros(1, 2).double()
    value, gradient = value_and_gradient(function, target, logits)
    assert value.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-7)
    assert gradient.tolist()[0] == pytest.approx([-0.25, 0.25], abs=1e-7)


@pytest.mark.parametrize(("n", "v"), [(1, 1), (1, 7), (128, 3), (129, 50), (300, 11)])
def test_twins_agree_in_float64(n, v):
    target, logits = random_pair(n, v)
    value, gradient = value_and_gradient(kl_divergence, target, logits, upstream=0.3)
    oracle = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=target), torch.distributions.Categorical(logits=logits)
    ).sum()
    twin_value, twin_gradient = value_and_gradient(kl_divergence_eager, target, logits, upstream=0.3)
    torch.testing.assert_close(value, oracle, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(twin_value, oracle, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, twin_gradient, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    target, logits = random_pair(5, 4)
    assert torch.autograd.gradcheck(lambda z: kl_divergence(target, z), logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype):
    target, logits = random_pair(200, 30, dtype)
    value, gradient = value_and_gradient(kl_divergence, target, logits)
    exact, exact_gradient = value_and_gradient(kl_divergence, target.double(), logits.double())
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    assert (gradient - exact_gradient).abs().max() <= 2 * torch.finfo(dtype).eps


def test_a_float64_target_makes_the_result_float64():
    target, logits = random_pair(3, 5)
    assert kl_divergence(target, logits.float()).dtype == torch.float64


def test_no_gradient_reaches_the_target():
    target, logits = (z.requires_grad_() for z in random_pair(4, 6))
    kl_divergence(target, logits).backward()
    assert target.grad is None


def test_nothing_is_recorded_without_grad():
    target, logits = random_pair(4, 6)
    with torch.no_grad():
        assert not kl_divergence(target, logits.requires_grad_()).requires_grad


@pytest.mark.parametrize("function", TWINS)
def test_equal_logits_up_to_a_shift_are_at_distance_zero(function):
    _, logits = random_pair(20, 9)
    value, gradient = value_and_gradient(function, logits + 5, logits)
    assert abs(value.item()) < 1e-13 and gradient.abs().max() < 1e-13


@pytest.mark.parametrize("function", TWINS)
@pytest.mark.parametrize(
    ("target", "logits", "expected", "gradient"),
    [
        ([0.0, -INF], [0.0, 0.0], math.log(2), [-0.5, 0.5]),
        ([0.0, -INF], [0.0, -INF], 0.0, [0.0, 0.0]),
        ([0.0, 0.0], [0.0, -INF], INF, [0.5, -0.5]),
    ],
)
def test_infinite_logits(function, target, logits, expected, gradient):
    value, got = value_and_gradient(function, torch.tensor([target]).double(), torch.tensor([logits]).double())
    assert value.item() == pytest.approx(expected) and got.tolist()[0] == pytest.approx(gradient)


@pytest.mark.parametrize("function", TWINS)
@pytest.mark.parametrize("bad", [0, 1])
def test_nan_propagates(function, bad):
    pair = list(random_pair(3, 4))
    pair[bad][1, 2] = float("nan")
    assert function(*pair).isnan()


@pytest.mark.parametrize("look", [True, False])
@pytest.mark.parametrize("n", [6, 300])
def test_rows_that_are_not_counted_add_nothing_whatever_they_hold(n, look, monkeypatch):
    monkeypatch.setattr(kl, "_read_at_no_cost", lambda tensor: look)
    target, logits = random_pair(n, 5)
    counted = torch.arange(n) % 3 != 1
    expected, gradient = value_and_gradient(kl_divergence, target[counted], logits[counted], upstream=0.3)
    target[1], target[4], logits[1, 2], logits[4] = float("nan"), INF, float("nan"), -INF
    value, found = value_and_gradient(partial(kl_divergence, counted=counted), target, logits, upstream=0.3)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(found[counted], gradient, rtol=0, atol=0)
    assert not found[~counted].any()
    with torch.no_grad():
        torch.testing.assert_close(kl_divergence(target, logits, counted), expected, rtol=1e-13, atol=0)
    logits[0, 0] = float("nan")
    assert kl_divergence(target, logits.requires_grad_(), counted).isnan()


def test_no_row_that_is_counted():
    target, logits = random_pair(4, 5)
    value, gradient = value_and_gradient(partial(kl_divergence, counted=torch.zeros(4).bool()), target, logits)
    assert value == 0 and not gradient.any()


def test_no_rows():
    value, gradient = value_and_gradient(kl_divergence, torch.zeros(0, 5), torch.zeros(0, 5))
    assert value.item() == 0 and gradient.shape == (0, 5)


def test_logits_in_any_order_of_memory():
    target, logits = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64).T.requires_grad_()
    value = kl_divergence(target, logits)
    value.backward()
    plain = logits.detach().contiguous().requires_grad_()
    kl_divergence_eager(target, plain).backward()
    assert abs(value.item() - kl_divergence_eager(target, plain).item()) < 1e-12
    torch.testing.assert_close(logits.grad, plain.grad, rtol=1e-12, atol=1e-14)
