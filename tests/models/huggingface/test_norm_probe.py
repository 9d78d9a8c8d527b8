import threading
from types import MethodType

import pytest
import torch
from pairs import gpt2, join, sparse_model, with_units
from torch import nn

import bridges
from bridges.models.huggingface.norm_probe import copy_as
from bridges.models.loading import as_residual

# Where each site's norm weight is, what is added to it, and whether it centres.
NORMS = {
    "gpt2": ("transformer", ["h.{}.ln_1", "h.{}.ln_2"], "ln_f", 0, True),
    "llama": ("model", ["layers.{}.input_layernorm", "layers.{}.post_attention_layernorm"], "norm", 0, False),
    "gemma2": ("model", ["layers.{}.input_layernorm", "layers.{}.pre_feedforward_layernorm"], "norm", 1, False),
    "nemotron": ("model", ["layers.{}.input_layernorm", "layers.{}.post_attention_layernorm"], "norm", 1, True),
    "bloom": ("transformer", ["h.{}.input_layernorm"], "ln_f", 0, True),
    "mamba": ("backbone", ["layers.{}.norm"], "norm_f", 0, False),
}


def true_norms(family, model):
    base, norms, last, plus, centred = NORMS[family]
    names = [norm.format(layer) for layer in range(2) for norm in norms] + [last]
    weights = [model.get_submodule(f"{base}.{name}").weight.detach() for name in names]
    if family == "gemma2":  # whatever its dtype, its norm adds in float32
        return [plus + weight.float() for weight in weights], centred
    return [plus + weight.double() for weight in weights], centred


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", NORMS)
def test_gain_and_centring_are_the_norms_own(family, dtype, tiny):
    model = tiny(family).to(dtype)
    chain = as_residual(model)
    gains, centred = true_norms(family, model)
    wide = torch.promote_types(dtype, torch.float32)
    assert len(gains) == len(chain.sites)
    for index, gain in enumerate(gains):
        norm = chain.norm(index)
        assert norm.present and norm.centred is centred and norm.gain.dtype == wide
        assert torch.equal(norm.gain, gain.to(wide))


@pytest.mark.parametrize("family", ["olmo2", "exaone4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_read_of_the_stream_itself_has_no_norm(family, dtype, tiny):
    model = tiny(family).to(dtype)
    chain = as_residual(model)
    for index in range(4):
        norm = chain.norm(index)
        assert not norm.present and not norm.centred and torch.equal(norm.gain, torch.ones_like(norm.gain))
    final = chain.norm(4)
    assert final.present and not final.centred and torch.equal(final.gain, model.model.norm.weight.to(final.gain))


def test_a_norm_without_weights_has_gain_one(tiny):
    for norm in (as_residual(tiny("olmo").double()).norm(i) for i in range(5)):  # a LayerNorm without parameters
        assert norm.present and norm.centred
        torch.testing.assert_close(norm.gain, torch.ones(32).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("family", "eps", "tolerance"), [("gpt2", 1e-5, 1e-9), ("llama", 1e-6, 1e-5)])
def test_gain_and_centring_give_the_read(family, eps, tolerance, tiny, tokens):
    """read = gain * C(h) / RMS(C(h)) + bias, method section 4; Llama's norm computes in float32."""
    model = tiny(family).double()
    chain = as_residual(model)
    with torch.no_grad():
        residuals, _ = chain.residuals(tokens)
        reads = chain.reads(tokens)
    for index, (h, read) in enumerate(zip(residuals, reads, strict=True)):
        gain, centred, _ = chain.norm(index)
        c = h - h.mean(-1, keepdim=True) if centred else h
        bias = 0
        if family == "gpt2":
            block = model.transformer.h[min(index // 2, 1)]
            bias = (model.transformer.ln_f if index == 4 else block.ln_2 if index % 2 else block.ln_1).bias
        expected = gain * c / (c.square().mean(-1, keepdim=True) + eps).sqrt() + bias
        torch.testing.assert_close(read, expected, rtol=tolerance, atol=tolerance)


def test_another_function_before_a_read_is_refused_with_its_site(tiny):
    model = tiny("gpt2")
    model.transformer.h[1].ln_2 = nn.Tanhshrink()
    chain = as_residual(model)
    with pytest.raises(ValueError, match=r"site='1.mlp'.*not a LayerNorm or an RMSNorm"):
        chain.norm(3)
    assert chain.norm(1).present


def test_a_projection_before_the_unembedding_is_refused(tiny):
    chain = as_residual(tiny("opt", word_embed_proj_dim=16))
    with pytest.raises(ValueError, match=r"site='final'.*not a LayerNorm or an RMSNorm"):
        chain.norm(2)


def test_measuring_leaves_modes_and_gradients_alone(tiny):
    model = tiny("gpt2").train()
    model.transformer.h[0].eval()
    chain = as_residual(model)
    modes = [module.training for module in model.modules()]
    assert not chain.norm(0).gain.requires_grad
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_that_differ_in_the_last_bit_are_not_confused(dtype, tiny):
    model = tiny("gpt2").to(dtype)
    block = model.transformer.h[0]
    with torch.no_grad():
        block.ln_2.weight.copy_(block.ln_1.weight * (1 + 2 * torch.finfo(dtype).eps))
        block.ln_2.bias.mul_(100)  # rounds a read in half precision by more than the weights differ
    chain = as_residual(model)
    assert not torch.equal(block.ln_1.weight, block.ln_2.weight)
    assert torch.equal(chain.norm(0).gain, block.ln_1.weight.float())
    assert torch.equal(chain.norm(1).gain, block.ln_2.weight.float())


class InlineNorm(nn.Module):
    """A layer that normalises attention's input in its own forward, with parameters of its own."""

    def __init__(self, block):
        super().__init__()
        self.attn, self.mlp, self.ln_2 = block.attn, block.mlp, block.ln_2
        self.gain, self.bias = block.ln_1.weight, block.ln_1.bias

    def forward(self, hidden_states, _cache, mask, *_args, **_kwargs):
        read = nn.functional.layer_norm(hidden_states, self.gain.shape, self.gain, self.bias)
        hidden_states = hidden_states + self.attn(read, attention_mask=mask)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_in_the_layers_own_forward_or_in_a_container_is_measured(dtype, tiny):
    model = tiny("gpt2").to(dtype)
    first, second = model.transformer.h
    model.transformer.h[0] = InlineNorm(first)
    second.ln_1 = nn.Sequential(second.ln_1)
    chain = as_residual(model)
    assert chain.sites == ["0.attn", "0.mlp", "1.block", "final"]
    for index, weight in enumerate([first.ln_1.weight, first.ln_2.weight, second.ln_1[0].weight]):
        norm = chain.norm(index)
        assert torch.equal(norm.gain, weight.float()) and norm.centred


def test_a_parametrised_weight_is_measured(tiny):
    model = tiny("llama").bfloat16()
    norm = model.model.layers[0].input_layernorm

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    original = norm.weight.detach().clone()
    nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())
    assert torch.equal(as_residual(model).norm(0).gain, 2 * original.float())


@pytest.mark.parametrize("index", [1, 4])
def test_measuring_leaves_the_model_and_its_hooks_alone(index, tiny):
    model = tiny("gpt2").bfloat16()
    chain = as_residual(model)
    expected = chain.norm(index).gain
    model.transformer.h[0].ln_2.register_forward_hook(lambda *_: pytest.fail("a hook of the user ran"))
    with chain.hook_residuals({1: lambda h: h + 100}):  # layer 0 runs as its two sublayers
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        assert torch.equal(chain.norm(index).gain, expected)
        assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_a_copy_shares_what_it_should_and_follows_no_hook():
    class Tracker:
        def __init__(self, module):
            self.module = module

        def __call__(self, *_):
            pytest.fail("a hook ran in the copy")

        def __deepcopy__(self, _memo):
            pytest.fail("what a hook refers to was copied")

    inner, shared = nn.LayerNorm(4).bfloat16(), nn.Linear(4, 4).bfloat16()
    module = nn.Sequential(inner, shared)
    inner.register_forward_hook(Tracker(module))
    copied = copy_as(module, torch.float64, [shared])
    assert copied[1] is shared and shared.weight.dtype == torch.bfloat16
    assert copied[0] is not inner and torch.equal(copied[0].weight, inner.weight.double())
    assert inner.weight.dtype == torch.bfloat16 and copied[0](torch.ones(4).double()).dtype == torch.float64


def test_attributes_that_cannot_be_copied_are_shared(tiny):
    model = tiny("gpt2").bfloat16()
    expected = [as_residual(model).norm(index).gain for index in range(5)]
    for part in (model, model.transformer.h[0], model.transformer.h[0].ln_2):
        part.lock = threading.Lock()
        part.activation = torch.ones(2, requires_grad=True) * 2
        part.parent = [model]
    chain = as_residual(model)
    assert all(torch.equal(chain.norm(index).gain, gain) for index, gain in enumerate(expected))


def test_an_attribute_that_is_a_weight_a_submodule_or_a_method_is_the_copys_own():
    module = nn.Sequential(nn.LayerNorm(4).bfloat16())
    vars(module).update(inner=module[0], weight=module[0].weight, method=MethodType(nn.Module.extra_repr, module))
    copied = copy_as(module, torch.float64)
    assert copied.inner is copied[0] and copied.method.__self__ is copied
    assert copied.weight is not module.weight and module[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("at", ["read", "residual"])
@pytest.mark.parametrize("mode", ["set", "add"])
def test_every_norm_can_be_measured_inside_a_steer(mode, at):
    pair = with_units(join(gpt2(), sparse_model()))
    model, edit = pair.dense.model, bridges.Edit("1.attn", 0, 0.7, mode)
    expected = [pair.dense.norm(index).gain for index in range(5)]
    with bridges.steer(model, pair.bridge_set, edit, sparse=pair.sparse.model, at=at):
        assert all(torch.equal(pair.dense.norm(index).gain, gain) for index, gain in enumerate(expected))
        if mode == "add":  # "set" depends on the tokens, and refuses the calls of parts that as_residual makes
            chain = as_residual(model)
            assert torch.equal(chain.norm(len(chain.sites) - 1).gain, expected[-1])


def test_neither_embeddings_nor_matrices_are_copied(tiny, monkeypatch):
    chain = as_residual(tiny("llama").bfloat16())
    for kind in (nn.Embedding, nn.Linear):
        monkeypatch.setattr(kind, "__deepcopy__", lambda *_: pytest.fail("a matrix was copied"), raising=False)
    assert all(chain.norm(index).present for index in range(5))
