import pytest
import torch
from torch import nn

from bridges.models.loading import as_residual

# Where each site's norm weight lies, what is added to it, and whether it centres.
NORMS = {
    "gpt2": ("transformer", ["h.{}.ln_1", "h.{}.ln_2"], "ln_f", 0, True),
    "llama": ("model", ["layers.{}.input_layernorm", "layers.{}.post_attention_layernorm"], "norm", 0, False),
    "gemma2": ("model", ["layers.{}.input_layernorm", "layers.{}.pre_feedforward_layernorm"], "norm", 1, False),
    "nemotron": ("model", ["layers.{}.input_layernorm", "layers.{}.post_attention_layernorm"], "norm", 1, True),
    "bloom": ("transformer", ["h.{}.input_layernorm"], "ln_f", 0, True),
    "mamba": ("backbone", ["layers.{}.norm"], "norm_f", 0, False),
}


def true_norms(family, model):
    base, places, last, plus, centred = NORMS[family]
    names = [place.format(layer) for layer in range(2) for place in places] + [last]
    weights = [model.get_submodule(f"{base}.{name}").weight.detach().double() for name in names]
    return [plus + weight for weight in weights], centred


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
        if dtype == torch.float64:
            torch.testing.assert_close(norm.gain, gain, rtol=0, atol=1e-9)
        else:
            assert torch.equal(norm.gain, gain.to(wide))


@pytest.mark.parametrize("family", ["olmo2", "exaone4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_norm_before_a_sublayer(family, dtype, tiny):
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
def test_the_norm_accounts_for_the_read(family, eps, tolerance, tiny, tokens):
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


def test_what_is_no_norm_is_refused_by_its_site(tiny):
    model = tiny("gpt2")
    model.transformer.h[1].ln_2 = nn.Tanhshrink()
    chain = as_residual(model)
    with pytest.raises(ValueError, match=r"site='1.mlp'.*not a LayerNorm or an RMSNorm"):
        chain.norm(3)
    assert chain.norm(1).present


def test_a_projection_before_the_unembedding_is_no_norm(tiny):
    chain = as_residual(tiny("opt", word_embed_proj_dim=16))
    with pytest.raises(ValueError, match=r"site='final'.*not a LayerNorm or an RMSNorm"):
        chain.norm(2)


def test_measuring_leaves_mode_and_gradients_alone(tiny):
    model = tiny("gpt2").train()
    model.transformer.h[0].eval()
    chain = as_residual(model)
    modes = [module.training for module in model.modules()]
    assert not chain.norm(0).gain.requires_grad
    assert [module.training for module in model.modules()] == modes
