import math

import pytest
import torch
from pairs import sparse_model

from bridges.sparsity.moving import moved_mask, moved_masks, moving_share
from bridges.sparsity.projection import sparse_parameters, supports
from bridges.sparsity.support import Support


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_move(weight, mask, gradient, count, n_new, dim=None, least=0, importance=None):
    """One entry after the other, in plain Python: reserve, keep, grow."""
    shape = weight.shape
    entries = [tuple(index) for index in torch.ones(shape).nonzero().tolist()]
    inside = [e for e in entries if mask[e]]
    outside = [e for e in entries if not mask[e]]
    n_new = 0 if gradient is None else min(n_new, len(outside))
    ranked_by = weight if importance is None else importance
    by_size = sorted(inside, key=lambda e: (-abs(ranked_by[e].item()), entries.index(e)))
    kept = []
    if dim is not None:
        for channel in range(shape[dim]):
            kept += [e for e in by_size if e[dim] == channel][:least]
    n_kept = min(count - n_new, len(inside))
    kept += [e for e in by_size if e not in kept][: max(0, n_kept - len(kept))]
    if gradient is not None:
        by_gradient = sorted(outside, key=lambda e: (-abs(gradient[e].item()), entries.index(e)))
        kept += by_gradient[: max(0, count - len(kept))]
    found = torch.zeros(shape, dtype=torch.bool)
    for e in kept:
        found[e] = True
    return found


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize(("count", "n_new"), [(20, 5), (12, 0), (8, 8), (35, 3), (40, 40), (1, 1)])
def test_the_largest_weights_stay_and_the_zeros_of_largest_gradient_come(dim, count, n_new):
    weight, gradient = draw(6, 8), draw(6, 8, seed=1)
    mask = draw(6, 8, seed=2) > 0.2
    weight = torch.where(mask, weight, 0)
    least = 0 if dim is None else 1
    expected = naive_move(weight, mask, gradient, count, n_new, dim, least)
    assert torch.equal(moved_mask(weight, mask, gradient, count, n_new, dim, least), expected)


def test_weights_are_ranked_by_their_importance_where_that_is_given():
    weight, gradient, importance = draw(6, 8), draw(6, 8, seed=1), draw(6, 8, seed=3).abs()
    mask = draw(6, 8, seed=2) > 0.2
    weight = torch.where(mask, weight, 0)
    found = moved_mask(weight, mask, gradient, 15, 4, 0, 1, importance)
    assert torch.equal(found, naive_move(weight, mask, gradient, 15, 4, 0, 1, importance))
    assert not torch.equal(found, moved_mask(weight, mask, gradient, 15, 4, 0, 1))


def test_a_large_weight_on_which_nothing_depends_leaves_before_a_small_one_that_counts():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[9.0, 0.5, 2.0]]))
    support = Support(model, supports(model))
    optimizer = torch.optim.AdamW(support.parameters(), lr=0.0)
    for _ in range(3):
        x = torch.randn(8, 3).double() * torch.tensor([0.0, 1.0, 1.0])  # the first input is always zero
        model(x).square().sum().backward()
        support.gather_gradients()
        optimizer.step()
        optimizer.zero_grad()
    ((name, mask),) = support.masks.items()
    importance = support.saliencies(optimizer)[name]
    moments = optimizer.state[support.parameters()[0]]
    assert torch.equal(importance, model.weight.detach().abs() * moments["exp_avg_sq"].sqrt())
    assert moved_mask(model.weight, mask, None, 2, 0, importance=importance).tolist() == [[False, True, True]]
    assert moved_mask(model.weight, mask, None, 2, 0).tolist() == [[True, False, True]]


def test_ties_go_to_the_lowest_index_and_entries_of_the_support_that_are_zero_are_the_smallest_of_it():
    weight = torch.tensor([[0.0, 2.0, 0.0, -2.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, True, False, False]])
    gradient = torch.tensor([[9.0, 9.0, 9.0, 9.0, 1.0, 1.0]], dtype=torch.float64)
    assert moved_mask(weight, mask, gradient, 4, 1).tolist() == [[True, True, False, True, True, False]]
    assert moved_mask(weight, mask, None, 3, 2).tolist() == [[True, True, False, True, False, False]]


def test_a_support_that_was_empty_grows_and_a_full_one_can_only_shrink():
    gradient = draw(3, 4)
    empty = torch.zeros(3, 4, dtype=torch.bool)
    grown = moved_mask(torch.zeros(3, 4, dtype=torch.float64), empty, gradient, 5, 1)
    assert torch.equal(grown, naive_move(torch.zeros(3, 4), empty, gradient, 5, 1))
    assert grown.sum() == 5
    full = moved_mask(draw(3, 4, seed=1), ~empty, gradient, 7, 3)
    assert torch.equal(full, naive_move(draw(3, 4, seed=1), ~empty, gradient, 7, 3))
    assert full.sum() == 7


def test_every_sparse_tensor_of_a_model_that_trains_gets_its_share_and_the_others_keep_theirs():
    model = sparse_model()
    model.lm_head.weight.requires_grad_(False)
    masks = supports(model)
    gradients = {name: draw(*p.shape, seed=3) for name, p in sparse_parameters(model) if p.requires_grad}
    found = moved_masks(model, masks, gradients, kept=0.3, share=0.2)
    assert torch.equal(found["lm_head.weight"], masks["lm_head.weight"])
    for name, parameter in sparse_parameters(model):
        if parameter.requires_grad:
            assert found[name].sum() == max(1, round(0.3 * parameter.numel())), name
            if name.endswith(("c_attn.weight", "c_fc.weight")):
                assert found[name].any(1).all()
            if name.endswith("c_proj.weight"):
                assert found[name].any(0).all()


def test_the_share_that_moves_is_half_a_cosine():
    for step in range(0, 120, 7):
        expected = 0.1 * (1 + math.cos(math.pi * step / 90)) if step < 90 else 0
        assert moving_share(step, 100, 0.2, until=0.9) == pytest.approx(expected, abs=1e-15)
