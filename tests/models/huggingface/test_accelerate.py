"""Models whose weights accelerate keeps elsewhere and brings for each call."""

import accelerate
import pytest
import torch

from bridges.models.loading import as_residual


def offload_all(model, _folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


def offload_by_layer(model, _folder):
    return accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["LlamaDecoderLayer"])


def spread(model, folder):
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    return accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=folder, force_hooks=True)


def one_device(model, _folder):
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


DISPATCHES = [offload_all, offload_by_layer, spread, one_device]


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dispatched_model_gives_the_same_chain(dispatch, dtype, tiny, tokens, padding, tmp_path):
    plain = as_residual(tiny("llama").to(dtype))
    model = dispatch(tiny("llama").to(dtype), tmp_path)
    forwards = {module: vars(module)["forward"] for module in model.modules() if "forward" in vars(module)}
    assert len(forwards) > 2
    chain = as_residual(model)
    assert chain.device == torch.device("cpu") and chain.sites == plain.sites
    with torch.no_grad():
        expected, logits = plain.residuals(tokens, padding)
        ours, our_logits = chain.residuals(tokens, padding)
        assert torch.equal(our_logits, logits)
        for i, (one, other) in enumerate(zip(ours, expected, strict=True)):
            assert torch.equal(one, other)
            assert torch.equal(chain.run_from(i, one, tokens, padding), logits)
        for one, other in zip(chain.reads(tokens), plain.reads(tokens), strict=True):
            assert torch.equal(one, other)
    assert {module: vars(module)["forward"] for module in model.modules() if "forward" in vars(module)} == forwards


@pytest.mark.parametrize(
    ("family", "dispatch"), [("gpt2", offload_all), *[("llama", dispatch) for dispatch in DISPATCHES]]
)
def test_a_dispatched_half_precision_model_has_the_exact_gains(family, dispatch, tiny, tmp_path):
    plain = as_residual(tiny(family).bfloat16())
    model = dispatch(tiny(family).bfloat16(), tmp_path)
    chain = as_residual(model)
    devices = {name: parameter.device for name, parameter in model.named_parameters()}
    for index in range(len(chain.sites)):
        assert torch.equal(chain.norm(index).gain, plain.norm(index).gain)
    assert {name: parameter.device for name, parameter in model.named_parameters()} == devices
