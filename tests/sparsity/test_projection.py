import math

import pytest
import torch
from torch import nn

from bridges.models.sparse.model import SparseConfig, SparseTransformer
from bridges.sparsity.projection import (
    clip_to_rms,
    kept_fraction,
    learning_rate,
    project,
    sparse_parameters,
    supports,
)

CHANNEL_DIM = {"attn.c_attn.weight": 0, "mlp.c_fc.weight": 0, "attn.c_proj.weight": 1, "mlp.c_proj.weight": 1}


def tiny_model(**settings):
    """Every kind of parameter, each away from zero, so that what survives is what was kept."""
    torch.manual_seed(0)
    shape = dict(block_size=6, vocab_size=23, n_layer=2, d_model=16, d_head=4, d_mlp=24, d_pos_emb=5)
    model = SparseTransformer(SparseConfig(**(shape | dict(enable_bigram_table=True) | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def channel_dim_of(name):
    return next((dim for suffix, dim in CHANNEL_DIM.items() if name.endswith(suffix)), None)


def projected_by_sorting(weight, count, channel_dim, minimum):
    """The same selection in Python: reserve each channel's largest, then fill up by magnitude, then index."""
    flat = weight.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))
    chosen = set()
    if channel_dim is not None:
        inner = weight.shape[1]
        for channel in range(weight.shape[channel_dim]):
            own = [i for i in order if (i // inner if channel_dim == 0 else i % inner) == channel]
            chosen.update(own[:minimum])
    for i in order:
        if len(chosen) >= count:
            break
        chosen.add(i)
    return torch.tensor([value if i in chosen else 0.0 for i, value in enumerate(flat)]).view(weight.shape)


@pytest.mark.parametrize("kept", [0.7, 0.3, 0.1, 0.001])
@pytest.mark.parametrize("minimum", [4, 0, 2])
def test_projection_is_the_sorted_one(kept, minimum):
    model = tiny_model()
    with torch.no_grad():  # ties, and a neuron far smaller than the rest
        model.transformer.h[0].attn.c_attn.weight.mul_(2).round_()
        model.transformer.h[1].mlp.c_fc.weight[3] *= 1e-6
        model.transformer.h[1].mlp.c_proj.weight[:, 5] = 0
    before = {name: parameter.detach().clone() for name, parameter in sparse_parameters(model)}
    project(model, kept, min_per_channel=minimum)
    for name, parameter in sparse_parameters(model):
        count = max(1, round(kept * parameter.numel()))
        expected = projected_by_sorting(before[name], count, channel_dim_of(name), minimum)
        assert torch.equal(parameter, expected), name


def test_counts_are_exact_and_channels_keep_their_minimum():
    model = tiny_model()
    project(model, 0.5)
    for _, parameter in sparse_parameters(model):
        assert torch.count_nonzero(parameter) == round(0.5 * parameter.numel())
    project(model, 1e-4)
    for name, parameter in sparse_parameters(model):
        channel_dim = channel_dim_of(name)
        if channel_dim is None:
            assert torch.count_nonzero(parameter) == 1
        else:  # the reserved entries alone are more than the count
            assert ((parameter != 0).sum(1 - channel_dim) == 4).all()


def test_a_dropped_weight_is_plus_zero():
    """Not -0.0, which a file of nonzeros would not restore bit for bit."""
    model = tiny_model()
    project(model, 0.2)
    assert not any(torch.signbit(parameter[parameter == 0]).any() for _, parameter in sparse_parameters(model))


@pytest.mark.parametrize("settings", [{}, {"rms_norm": False}, {"d_pos_emb": None}, {"sinusoidal_cat_pos_emb": True}])
def test_unpruned_parameters_are_left_alone(settings):
    model = tiny_model(**settings)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    project(model, 0.1)
    untouched = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    expected = {name for name in before if "ln_" in name or "sink_logit" in name}
    expected |= {"final_logits_bias", "bigram_table"}
    if settings.keys() & {"d_pos_emb", "sinusoidal_cat_pos_emb"}:
        expected.add("transformer.wpe.weight")
    assert untouched == expected


def test_tied_tensors_are_projected_once():
    model = tiny_model(tied_unembed=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len([name for name, _ in sparse_parameters(model) if "wte" in name or "lm_head" in name]) == 1


def test_keeping_all_changes_nothing():
    model = tiny_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    project(model, 1.0)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("kept", [0.0, -0.1, 1.1, float("nan")])
def test_a_fraction_out_of_range_is_named(kept):
    with pytest.raises(ValueError, match="kept"):
        project(tiny_model(), kept)


def test_a_matrix_narrower_than_the_minimum_keeps_all():
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.c_fc = nn.Linear(3, 5, bias=False)
    project(model, 0.1)
    assert (model.mlp.c_fc.weight != 0).all()


def test_supports_are_the_nonzeros_of_the_sparse_tensors():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = 0
    found = supports(model)
    assert list(found) == [name for name, _ in sparse_parameters(model)]
    assert all(mask.all() for name, mask in found.items() if name != "lm_head.weight")
    assert not found["lm_head.weight"][3].any() and int(found["lm_head.weight"].sum()) == 22 * 16


def test_kept_fraction_by_hand():
    assert [kept_fraction(step, 8, 0.2) for step in (1, 2, 4, 5, 8)] == pytest.approx([0.8, 0.6, 0.2, 0.2, 0.2])
    assert kept_fraction(4, 8, 0.2, anneal=0.8) == pytest.approx(1 - 0.8 * 4 / 6.4)
    assert kept_fraction(1, 8, 0.2, anneal=0.0) == 0.2
    assert kept_fraction(1, 8, 0.2, start=0.6) == pytest.approx(0.5) and kept_fraction(6, 8, 0.2, start=0.6) == 0.2


def test_learning_rate_by_hand():
    rates = [learning_rate(step, 5, 2.0, warmup=0.4) for step in range(1, 6)]
    assert rates == pytest.approx([1.0, 2.0, 1.5, 1.0, 0.5])
    assert learning_rate(1, 5, 2.0) == 2.0  # 1 % of 5 steps is one step of warm-up
    assert learning_rate(500, 10_000, 1.0, warmup=0.1, kept=0.16, target=0.04) == pytest.approx(0.25)


@pytest.mark.parametrize(("size", "scale"), [(3.0, 1 / 3), (0.5, 1.0)])
def test_clipping_to_rms(size, scale):
    parameters = [nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(2))]
    for parameter in parameters[:2]:
        signs = torch.arange(parameter.numel()).view(parameter.shape) % 2 * 2.0 - 1
        parameter.grad = size * signs
    before = [parameter.grad.clone() for parameter in parameters[:2]]
    assert clip_to_rms(parameters).item() == pytest.approx(size)
    for parameter, gradient in zip(parameters, before, strict=False):
        torch.testing.assert_close(parameter.grad, gradient * scale)
    assert parameters[2].grad is None


def test_rms_is_over_all_entries_not_per_tensor():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.zeros(3), torch.full((1,), 6.0)
    assert clip_to_rms(parameters, max_rms=1.5).item() == pytest.approx(3.0)
    assert parameters[1].grad.item() == pytest.approx(3.0)


def test_rms_of_float16_does_not_overflow():
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    parameter.grad = torch.full((1000,), 300.0, dtype=torch.float16)
    assert clip_to_rms([parameter]).item() == pytest.approx(300)
    assert parameter.grad.float().square().mean().sqrt() == pytest.approx(1, abs=1e-3)


def test_rms_of_nothing_and_of_zeros():
    assert clip_to_rms([nn.Parameter(torch.ones(2))]) == 0
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.zeros(2)
    assert clip_to_rms([parameter]) == 0 and math.isfinite(parameter.grad.sum())


def test_frozen_parameters_are_not_projected():
    model = tiny_model()
    model.lm_head.weight.requires_grad_(False)
    before = model.lm_head.weight.clone()
    project(model, 0.2)
    assert torch.equal(model.lm_head.weight, before)
    assert (model.transformer.wte.weight != 0).double().mean() < 0.25
