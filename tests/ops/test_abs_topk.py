import subprocess
import sys

import pytest
import torch

from bridges.ops import compiled
from bridges.ops.abs_topk import LONG_ROW, abs_topk, abs_topk_at, abs_topk_eager, abs_topk_mask, abs_topk_mask_eager

TWINS = [abs_topk, abs_topk_eager]
MASKS = [abs_topk_mask, abs_topk_mask_eager]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INF, NAN = float("inf"), float("nan")


def seeded(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def oracle(x, k):
    """The mask by sorting Python's numbers: largest magnitude first, then lowest index."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    rows, kept = x.reshape(-1, x.shape[-1]).tolist(), mask.view(-1, x.shape[-1])
    for i, row in enumerate(rows):
        order = sorted(range(len(row)), key=lambda j: (-INF if row[j] != row[j] else -abs(row[j]), row[j] == row[j], j))
        kept[i, order[:k]] = True
    return mask


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "k"), [((1,), 1), ((7,), 3), ((5, 33), 32), ((2, 3, 65), 16), ((40, 129), 1)])
def test_mask_is_that_of_sorting(mask, dtype, shape, k):
    x = seeded(*shape, dtype=dtype)
    assert torch.equal(mask(x, k), oracle(x, k))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index(mask, dtype):
    x = (seeded(60, 41) * 1.5).round().to(dtype)
    for k in (1, 5, 20, 40):
        assert torch.equal(mask(x, k), oracle(x, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "nan and infinity", "equal"])
def test_long_rows_are_searched_by_brackets(kind, dtype):
    x = seeded(2, LONG_ROW + 3, dtype=torch.float64)
    if kind == "ties":
        x = (x * 3).round()
    elif kind == "zeros":
        x[:, 50:] = 0
    elif kind == "nan and infinity":
        x[0, 7], x[0, 9], x[1, 3] = NAN, -INF, INF
    elif kind == "equal":
        x[:] = -2.0
    x = x.to(dtype)
    for k in (1, 49, 700, LONG_ROW + 2):
        assert torch.equal(abs_topk_mask(x, k), abs_topk_mask_eager(x, k))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", ["smallest", "largest"])
def test_the_smallest_and_largest_numbers_are_compared_exactly(mask, dtype, scale):
    """Subnormals, the largest numbers, infinities, both zeros, and rows of magnitudes far from the row before."""
    info = torch.finfo(dtype)
    unit = info.smallest_normal * info.eps if scale == "smallest" else info.max / 8
    x = (seeded(20, 30, dtype=torch.float64) * 2).round().to(dtype) * torch.tensor(unit, dtype=torch.float64).to(dtype)
    x[1], x[2], x[3] = 0.0, -0.0, seeded(30, dtype=dtype)
    x[4, ::3], x[5, 7], x[6] = INF, -INF, -INF
    for k in (1, 9, 29):
        assert torch.equal(mask(x, k), oracle(x, k))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_counts_as_the_largest_magnitude(mask, dtype):
    x = torch.tensor([[1.0, INF, NAN, -INF, -NAN], [NAN, 0.0, 2.0, NAN, NAN]], dtype=dtype)
    assert mask(x, 3).tolist() == [[False, True, True, False, True], [True, False, False, True, True]]


@pytest.mark.parametrize("function", TWINS)
@pytest.mark.parametrize("value", [0.0, -2.0])
def test_equal_rows_keep_the_first_k(function, value):
    x = torch.full((3, 6), value, requires_grad=True)
    kept = function(x, 2)
    kept.sum().backward()
    assert kept.tolist() == [[value, value, 0, 0, 0, 0]] * 3
    assert x.grad.tolist() == [[1, 1, 0, 0, 0, 0]] * 3  # kept entries that are 0 have a gradient too


@pytest.mark.parametrize("function", TWINS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_entries_are_unchanged_and_the_rest_is_zero(function, dtype):
    x = seeded(4, 5, 20, dtype=dtype)
    x[0, 0, 3] = INF  # times 0 would be NaN
    kept = function(x, 6)
    assert kept.dtype == dtype
    assert torch.equal(kept, torch.where(oracle(x, 6), x, 0))


@pytest.mark.parametrize("function", TWINS)
def test_any_memory_layout(function):
    base = seeded(12, 10, 8)
    for x in (base.transpose(0, 2), base[::2, 1:, ::3], base[:, :1].expand(12, 5, 8), base.mT, base[:0], base[0, 0]):
        expected = torch.where(oracle(x, 2), x, 0)
        assert torch.equal(function(x, 2), expected)


@pytest.mark.parametrize("function", TWINS)
@pytest.mark.parametrize("k", [6, 7, 100])
def test_k_of_the_whole_row_returns_x_itself(function, k):
    x = seeded(2, 6)
    assert function(x, k) is x
    assert abs_topk_mask(x, k).all()


@pytest.mark.parametrize("with_numba", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_abs_topk_at_equals_those_channels_of_abs_topk(with_numba, dtype, monkeypatch):
    monkeypatch.setattr(compiled, "_HAS_NUMBA", with_numba and compiled._HAS_NUMBA)
    x = (seeded(4, 15, 21) * 1.5).round().to(dtype)  # many ties
    x[0, 0, ::3], x[0, 1, 4], x[0, 2, :9], x[0, 3] = INF, -INF, NAN, -0.0
    x[1], x[2] = seeded(15, 21, dtype=dtype), torch.finfo(dtype).smallest_normal * x[2].to(dtype)
    for k, channels in (
        (1, [0]),
        (5, [20, 3, 3]),
        (20, list(range(21))),
        (4, [9, 8, 7, 6, 5, 4, 3, 2, 1]),
        (21, [7]),
        (99, [7, 0]),
        (4, []),
    ):
        assert torch.equal(  # bits: NaN is equal to itself, -0 is not 0
            abs_topk_at(x, k, channels).view(torch.uint8), abs_topk(x, k)[..., channels].view(torch.uint8)
        )
    base = seeded(12, 10, 8, dtype=dtype)
    for view in (base.transpose(0, 2), base[::2, 1:, ::3], base.mT, base[:0], base[0, 0], base.requires_grad_()):
        assert torch.equal(abs_topk_at(view, 2, [2, 0]), abs_topk(view, 2)[..., [2, 0]])
        assert not abs_topk_at(view, 2, [1]).requires_grad


@pytest.mark.parametrize("channel", [-1, 8])
def test_channels_outside_the_row_are_refused(channel):
    with pytest.raises(ValueError, match=rf"channels=\[{channel}\] must lie between 0 and 7"):
        abs_topk_at(torch.ones(2, 8), 3, [0, channel])


@pytest.mark.parametrize("function", TWINS + MASKS)
@pytest.mark.parametrize("k", [0, -1, 2.0, "3"])
def test_a_bad_k_is_refused(function, k):
    # The test run's check of types speaks first where k is no integer.
    with pytest.raises((ValueError, TypeError), match="k"):
        function(torch.ones(2, 4), k)


@pytest.mark.parametrize("function", TWINS)
def test_gradients_in_float64(function):
    x = seeded(3, 4, 9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: function(z, 3), x)
    assert torch.autograd.gradgradcheck(lambda z: function(z, 3) ** 2, x)


@pytest.mark.parametrize("function", TWINS)
def test_gradient_reaches_kept_entries_only(function):
    x, upstream = seeded(5, 30).requires_grad_(), seeded(30, 5, seed=1).T  # an upstream that is not contiguous
    function(x, 7).backward(upstream)
    assert torch.equal(x.grad, torch.where(oracle(x.detach(), 7), upstream, 0))


@pytest.mark.parametrize("function", TWINS)
def test_grad_modes_and_autocast(function):
    x = seeded(3, 8).requires_grad_()
    expected = torch.where(oracle(x.detach(), 2), x.detach(), 0)
    with torch.no_grad():
        assert not function(x, 2).requires_grad
    with torch.inference_mode():
        assert torch.equal(function(x + 0, 2), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = function(x, 2)
    assert kept.requires_grad and torch.equal(kept.detach(), expected)


@pytest.mark.slow
def test_under_torch_compile():
    """In a process of its own: torch.compile cannot trace the check of types that the test run adds."""
    code = """
import torch
from bridges.ops.abs_topk import abs_topk, abs_topk_eager
x = torch.randn(6, 11).round().requires_grad_()
compiled = torch.compile(lambda z: abs_topk(2 * z, 4).square().sum(), backend="aot_eager")
(gradient,) = torch.autograd.grad(compiled(x), x)
(expected,) = torch.autograd.grad(abs_topk_eager(2 * x, 4).square().sum(), x)
assert torch.equal(gradient, expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_numba(monkeypatch):
    monkeypatch.setattr(compiled, "_HAS_NUMBA", False)
    x = seeded(6, 11).requires_grad_()
    kept = abs_topk(x, 4)
    kept.sum().backward()
    assert torch.equal(x.grad.bool(), oracle(x.detach(), 4))
