"""Matrices of constants and few varying columns against whole ones."""

import pytest
import torch

from bridges.circuits.columns import Columns, Matrix, add_masked, read_columns, topk_columns
from bridges.circuits.masks import masked
from bridges.models.sparse.blocks import AbsTopK, RMSNorm

ROWS, WIDTH = 5, 12


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_columns(n_varying, seed=0, levels=None):
    """Columns of which n vary; with `levels`, whole numbers up to it, so that magnitudes tie."""
    index = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(seed))[:n_varying].sort().values
    constant, values = drawn(WIDTH, seed=seed), drawn(ROWS, n_varying, seed=seed + 1)
    if levels is not None:
        constant, values = (x.mul(2).round().clamp(-levels, levels) for x in (constant, values))
    return Columns(constant, index, values)


@pytest.mark.parametrize("n_varying", [0, 1, 3, 11, 12])
@pytest.mark.parametrize("k", [1, 2, 6, 11, 12, None])
@pytest.mark.parametrize("levels", [None, 2, 0])
def test_abs_topk_of_columns_is_that_of_the_matrix_ties_included(n_varying, k, levels):
    for seed in range(5):
        x = some_columns(n_varying, 10 * seed, levels)
        found, keep = topk_columns(AbsTopK(k), x), AbsTopK(k)
        assert torch.equal(found.expanded(), keep(x.expanded()))
        assert set(x.index.tolist()) <= set(found.index.tolist()) and len(found.index) <= 2 * n_varying


def test_a_matrix_is_split_and_taken_apart_as_a_whole_one():
    x = some_columns(5)
    rows = torch.tensor([3, 3, 0])
    assert torch.equal(x.take(rows).expanded(), x.expanded()[rows])
    for part, expected in zip(x.split(3), x.expanded().chunk(3, dim=1), strict=True):
        assert torch.equal(part.expanded(), expected)
    assert torch.equal(Columns.whole(x.expanded()).expanded(), x.expanded())


def test_a_read_has_values_and_gradients_of_the_norm_and_abs_topk():
    norm, positions, keep = RMSNorm(9).double(), drawn(ROWS, 3, seed=4), AbsTopK(7)
    with torch.no_grad():
        norm.weight.copy_(drawn(9, seed=5))
    norm.requires_grad_(False)
    on = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1]).bool()
    residual = drawn(ROWS, 9, seed=6).requires_grad_()
    weights = drawn(ROWS, int(on.sum()), seed=7)
    expected = keep(torch.cat([norm(residual), positions], dim=1))
    read = read_columns(norm, keep, residual, positions, on)
    assert torch.equal(read.columns.expanded(), expected) and torch.equal(read.values, expected[:, on])
    gradients = [torch.autograd.grad((weights * x).sum(), residual)[0] for x in (expected[:, on], read.values)]
    assert gradients[0].abs().max() > 0.1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("added", [False, True], ids=["matrix", "stream"])
def test_masked_columns_have_the_gradients_of_the_masked_matrix(added):
    x, mean, parameter = some_columns(6), drawn(WIDTH, seed=8), drawn(WIDTH, seed=9).clamp(-0.9, 0.9)
    parameter[~torch.isin(torch.arange(WIDTH), x.index)] = -0.5  # constants are off
    linear = torch.nn.Linear(WIDTH, 8).double().requires_grad_(False)
    linear.weight[drawn(8, WIDTH, seed=10) < 0.8] = 0
    residual, wanted = drawn(ROWS, WIDTH, seed=11), torch.arange(8) % 3 != 1
    weights = drawn(ROWS, WIDTH if added else 8, seed=12)

    def gradients(of):
        leaves = [one.clone().requires_grad_() for one in (x.values, parameter, residual)]
        y = of(Columns(x.constant, x.index, leaves[0]), *leaves[1:])
        loss = (weights * (y if added else y * wanted)).sum()  # no loss depends on what is not wanted
        return y, torch.autograd.grad(loss, leaves, allow_unused=True)

    def plain(columns, parameter, residual):
        y = masked(columns.expanded(), parameter, mean)
        return residual + y if added else linear(y)

    def fast(columns, parameter, residual):
        live = columns.live(parameter.detach() > 0)
        if added:
            return add_masked(residual, live, parameter, mean)
        return Matrix.of(linear).masked(live, parameter, mean, wanted).expanded()

    (expected, naive), (found, faster) = gradients(plain), gradients(fast)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(naive, faster, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.abs().max() > 0.01
            torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)
