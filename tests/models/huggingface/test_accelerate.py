"""Models whose weights accelerate keeps elsewhere and brings for each call."""

from functools import cache

import accelerate
import pytest
import torch
from fits import DATA, run, same
from pairs import join, sparse_model, with_units
from pairs import tokens as ids
from steered import EDITS, llama, steered
from transformers import AutoModelForCausalLM

from bridges.evaluate import evaluate
from bridges.io.fingerprint import fingerprint
from bridges.models.loading import as_residual
from bridges.steering.steer import steer


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


@pytest.fixture
def prepared():
    """A function that prepares a model for bfloat16 as a user's training script does."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # another test may have left it
    yield lambda model: accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_model_prepared_for_mixed_precision_is_the_chain_of_its_weights(family, prepared, tiny, tokens, padding):
    plain, model = as_residual(tiny(family)), prepared(tiny(family))
    own = vars(model)["forward"]
    chain = as_residual(model)
    assert chain.sites == plain.sites and vars(model)["forward"] is own
    with torch.no_grad():
        expected, logits = plain.residuals(tokens, padding)
        ours, our_logits = chain.residuals(tokens, padding)
    assert torch.equal(our_logits, logits)
    for i, (one, other) in enumerate(zip(ours, expected, strict=True)):
        assert torch.equal(one, other)
        assert torch.equal(chain.norm(i).gain, plain.norm(i).gain)


def test_a_model_prepared_for_mixed_precision_is_steered_in_it(prepared):
    """The oracle is the plain model inside autocast."""
    plain, model = (with_units(join(llama().float(), sparse_model(dtype=torch.float32))) for _ in range(2))
    ready = prepared(model.dense.model)
    for name, options in (("add", {}), ("several", {"source": "encoder"})):
        with torch.no_grad():
            with steered(plain, EDITS[name], **options), torch.autocast("cpu", torch.bfloat16):
                expected = plain.dense.model(ids()).logits.float()
            with steer(ready, model.bridge_set, EDITS[name], sparse=model.sparse, **options) as yielded:
                found = yielded(ids()).logits
        assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_dispatched_model_is_steered_as_the_plain_one(dispatch, tmp_path):
    """accelerate wraps forward of every module, steer that of the model around it."""
    pair, found = with_units(join(llama().float(), sparse_model(dtype=torch.float32))), []
    how = dict(max_new_tokens=3, do_sample=False, pad_token_id=0)
    for dispatched in (False, True):
        model = dispatch(pair.dense.model, tmp_path) if dispatched else pair.dense.model
        before = {name: id(vars(part).get("forward")) for name, part in model.named_modules()}
        with steer(model, pair.bridge_set, EDITS["several"], sparse=pair.sparse), torch.no_grad():
            found.append((model(ids()).logits, model.generate(ids(), **how)))
        assert {name: id(vars(part).get("forward")) for name, part in model.named_modules()} == before
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def plain_llama():
    return llama().float()


@cache
def plain_fit(steps):
    return run(dense=plain_llama(), sparse=sparse_model(dtype=torch.float32), steps=steps)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_dispatched_model_is_fitted_as_the_plain_one(dispatch, steps, tmp_path):
    """On a CPU bit for bit; and what required gradients does so afterwards."""
    model = dispatch(plain_llama(), tmp_path)
    next(model.parameters()).requires_grad_(False)
    trainable = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    found = run(dense=model, sparse=sparse_model(dtype=torch.float32), steps=steps)
    assert same(found, plain_fit(steps)) and found.provenance == plain_fit(steps).provenance
    assert [(name, parameter.requires_grad) for name, parameter in model.named_parameters()] == trainable


def test_an_offloaded_model_that_has_run_in_inference_mode_can_be_fitted():
    chain = as_residual(offload_all(plain_llama(), None))
    with torch.inference_mode():
        chain.model(ids())
    assert same(run(dense=chain, sparse=sparse_model(dtype=torch.float32), steps=2), plain_fit(2))


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_dispatched_model_passes_the_check_of_models(dispatch, tmp_path):
    sparse, changed = sparse_model(dtype=torch.float32), plain_llama()
    with torch.no_grad():
        changed.lm_head.weight[3, 4] += 0.5
    bridge_set = plain_fit(0)
    model, other = dispatch(plain_llama(), tmp_path / "one"), dispatch(changed, tmp_path / "other")
    figures = evaluate(model, sparse, bridge_set, DATA, progress=False).flat()
    assert figures == evaluate(plain_llama(), sparse, bridge_set, DATA, progress=False).flat()
    with steer(model, bridge_set, EDITS["several"], sparse=sparse):
        pass
    with pytest.raises(ValueError, match="is not the model that these bridges were fitted to"):
        evaluate(other, sparse, bridge_set, DATA, progress=False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "dispatch"), [("gpt2", offload_all), *[("llama", dispatch) for dispatch in DISPATCHES]]
)
def test_a_dispatched_model_has_the_fingerprint_of_the_plain_one(family, dispatch, tied, tiny, tokens, tmp_path):
    """Before a pass and after one, which leaves separate placeholders of tied embeddings."""
    model = dispatch(tiny(family, tie_word_embeddings=tied), tmp_path)
    mark = fingerprint(tiny(family, tie_word_embeddings=tied))
    assert fingerprint(model) == mark
    model(tokens)
    assert fingerprint(model) == mark


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_is_loaded_onto_disk_has_the_fingerprint_of_the_loaded_one(dtype, tied, tiny, tokens, tmp_path):
    """Its weights stay in float32 in the file, and become `dtype` where they are brought."""
    tiny("llama", tie_word_embeddings=tied).save_pretrained(tmp_path)
    mark = fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    on_cpu = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    for devices in ({"": "disk"}, {**on_cpu, "model.layers": "disk"}):
        options = {"device_map": devices, "offload_folder": tmp_path / "offloaded"}
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, **options)
        assert fingerprint(model) == mark
        model(tokens)
        assert fingerprint(model) == mark


def test_an_offloaded_sparse_transformer_is_refused():
    with pytest.raises(ValueError, match=r"parameter '.*' of a SparseTransformer is offloaded.* without a"):
        as_residual(accelerate.cpu_offload(sparse_model(), execution_device="cpu"))
