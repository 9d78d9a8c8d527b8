import torch
from pairs import sparse_model, tokens

from bridges.circuits.masks import INITIAL_VALUE, Masks, ablated
from bridges.circuits.nodes import node_means, place_sizes, replaced_nodes


def masks_of(model, **off):
    means = node_means(model, [(tokens(seed=3), None)])
    allowed = {place: torch.ones(size, dtype=torch.bool) for place, size in place_sizes(model).items()}
    for place, indices in off.items():
        allowed[place.replace("_", ".")][indices] = False
    return Masks(means, allowed, torch.Generator().manual_seed(0))


def test_masks_start_on_and_those_that_are_not_allowed_stay_off():
    masks = masks_of(sparse_model(), **{"0_attn_q": [1, 2]})
    on = masks.on()
    assert not on["0.attn.q"][[1, 2]].any() and sum(int((~m).sum()) for m in on.values()) == 2
    assert (masks.parameters["1.mlp.read"] - INITIAL_VALUE).abs().max() < 0.1
    with torch.no_grad():
        for parameter in masks.parameters.values():
            parameter += 5
    masks.clamp()
    assert all(p.max() == 1 for p in masks.parameters.values())
    assert (masks.parameters["0.attn.q"][[1, 2]] == -1).all()


def test_the_masked_model_is_the_ablated_one_bit_for_bit():
    model = sparse_model().eval()
    masks = masks_of(model)
    with torch.no_grad():
        for parameter in masks.parameters.values():
            parameter[::3] *= -1
        with masks.applied(model):
            masked = model(tokens()).logits
        with ablated(model, masks.on(), masks.means):
            assert torch.equal(masked, model(tokens()).logits)


def test_the_surrogate_gradient_is_that_of_a_mask_that_is_relaxed_at_its_present_value():
    """d loss / d parameter = sigmoid'(parameter) * d loss / d mask of mean + mask * (x - mean), by autograd."""
    model = sparse_model().eval()
    masks = masks_of(model)
    with torch.no_grad():
        for parameter in masks.parameters.values():
            parameter[::2] *= -1
    with masks.applied(model):
        (model(tokens()).logits.square().sum() + 3 * masks.count()).backward()
    relaxed = {place: mask.double().requires_grad_() for place, mask in masks.on().items()}
    functions = {
        place: lambda x, place=place: masks.means[place] + relaxed[place] * (x - masks.means[place])
        for place in relaxed
    }
    with replaced_nodes(model, functions):
        loss = model(tokens()).logits.square().sum() + 3 * sum(mask.sum() for mask in relaxed.values())
    for (place, parameter), gradient in zip(
        masks.parameters.items(), torch.autograd.grad(loss, list(relaxed.values())), strict=True
    ):
        slope = torch.sigmoid(parameter.detach()) * (1 - torch.sigmoid(parameter.detach()))
        torch.testing.assert_close(parameter.grad, gradient * slope, rtol=1e-8, atol=1e-8, msg=place)
    assert int(masks.count()) == sum(int(mask.sum()) for mask in masks.on().values())
