import pytest
import torch

import bridges.ops.compiled as compiled
from bridges.ops.sparse_linear import NonzeroPattern, dense_gradient_linear, sparse_linear, sparse_linear_eager

SHAPES = {
    "wide": ((3, 7), 20, 30, 0.2),
    "one row": ((1,), 5, 1, 0.5),
    "over a block": ((2, 300), 6, 4, 0.4),
    "no nonzeros": ((4,), 3, 5, 0.0),
    "all nonzeros": ((4,), 3, 5, 1.0),
    "no tokens": ((0,), 3, 5, 0.5),
}


def problem(batch, n_in, n_out, density, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n_out, n_in, generator=generator, dtype=dtype)
    mask = torch.rand(n_out, n_in, generator=generator) < density
    x = torch.randn(*batch, n_in, generator=generator, dtype=dtype)
    bias = torch.randn(n_out, generator=generator, dtype=dtype)
    pattern = NonzeroPattern.from_mask(mask)
    leaves = [t.requires_grad_() for t in (x, weight.flatten()[pattern.flat], bias)]
    return leaves, pattern, torch.where(mask, weight, 0)


def outcome(function, leaves, pattern):
    x, values, bias = leaves
    y = function(x, values, pattern, bias)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return y, *torch.autograd.grad(y, leaves, upstream)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_of_the_dense_product(shape):
    leaves, pattern, weight = problem(*shape)
    found, expected = outcome(sparse_linear, leaves, pattern), outcome(sparse_linear_eager, leaves, pattern)
    assert torch.allclose(expected[0], leaves[0] @ weight.T + leaves[2], atol=1e-12)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_a_single_row_without_a_batch():
    (_, values, bias), pattern, weight = problem((2,), 20, 30, 0.2)
    x = torch.randn(20, dtype=torch.float64)
    for y in (sparse_linear(x, values, pattern, bias), dense_gradient_linear(x, weight, pattern, bias)):
        torch.testing.assert_close(y, weight @ x + bias)


def test_zeros_hide_what_is_not_finite():
    weight = torch.eye(3, dtype=torch.float64)
    x, values = torch.tensor([1.0, torch.nan, 2.0]).double(), torch.ones(3).double()
    y = sparse_linear(x, values, NonzeroPattern.from_mask(weight != 0))
    assert y[0] == 1 and y[1].isnan() and y[2] == 2


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_all_entries_of_a_matrix_get_their_gradient(shape, with_bias):
    (x, _, bias), pattern, weight = problem(*shape)
    weight, bias = weight.detach().requires_grad_(), bias if with_bias else None
    leaves = [x, weight, bias] if with_bias else [x, weight]
    outs = [dense_gradient_linear(x, weight, pattern, bias), torch.nn.functional.linear(x, weight, bias)]
    upstream = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    found, expected = ([out, *torch.autograd.grad(out, leaves, upstream)] for out in outs)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_other_dtypes(dtype, tolerance):
    leaves, pattern, weight = problem((9,), 40, 25, 0.1, dtype)
    y = outcome(sparse_linear, leaves, pattern)[0]
    exact = leaves[0].double() @ weight.double().T + leaves[2].double()
    assert y.dtype == dtype and (y.double() - exact).abs().max() < tolerance * exact.abs().max()


def test_nan_and_infinity_propagate():
    leaves, pattern, _ = problem((4,), 6, 6, 1.0)
    x = leaves[0].detach().clone()
    x[1, 2], x[2, 3] = float("nan"), float("inf")
    y = sparse_linear(x, leaves[1].detach(), pattern)
    assert y[1].isnan().all() and not y[2].isfinite().any() and y[[0, 3]].isfinite().all()


def test_an_input_without_gradient_gets_none_and_the_values_get_theirs():
    leaves, pattern, _ = problem((4,), 6, 5, 0.5)
    y = sparse_linear(leaves[0].detach(), leaves[1], pattern)
    y.sum().backward()
    assert torch.allclose(leaves[1].grad, leaves[0].detach().sum(0)[pattern.columns])


def test_without_numba(monkeypatch):
    leaves, pattern, _ = problem((4,), 6, 5, 0.5)
    expected = outcome(sparse_linear, leaves, pattern)
    monkeypatch.setattr(compiled, "_HAS_NUMBA", False)
    for one, other in zip(outcome(sparse_linear, leaves, pattern), expected, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
