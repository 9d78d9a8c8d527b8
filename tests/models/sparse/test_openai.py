"""The published layouts: what the release's own implementation computed, and every refusal by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from bridges.models.loading import as_residual
from bridges.models.sparse.model import SparseConfig, SparseTransformer
from bridges.models.sparse.openai import published_config

FIXTURES = Path(__file__).parents[2] / "fixtures" / "circuit_sparsity"
NAMES = ["a_rms_sink_bigram", "b_pos_concat", "c_layernorm_abs_pos"]


def expected(name):
    return torch.load(FIXTURES / name / "expected.pt", weights_only=True)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def release(tmp_path):
    """A copy of the first fixture, to be damaged, and a way to change its configuration and tensors."""
    folder = tmp_path / "release"
    shutil.copytree(FIXTURES / NAMES[0], folder)
    return folder


def change(folder, keys=None, tensors=None):
    config, weights = folder / "beeg_config.json", folder / "final_model.pt"
    config.write_text(json.dumps({**json.loads(config.read_text()), **(keys or {})}))
    state = {**torch.load(weights, weights_only=True), **(tensors or {})}
    torch.save({key: value for key, value in state.items() if value is not None}, weights)


def hub_folder(folder, name, shards=1):
    """The same network as a Hugging Face folder whose remote code would write a file."""
    folder.mkdir()
    source = FIXTURES / name
    keys = json.loads((source / "beeg_config.json").read_text())
    auto_map = {"AutoConfig": "remote.Config", "AutoModelForCausalLM": "remote.Model"}
    extra = {
        "model_type": "circuitgpt",
        "architectures": ["Model"],
        "auto_map": auto_map,
        "transformers_version": "4.9",
    }
    (folder / "config.json").write_text(json.dumps({**keys, **extra, "bos_token_id": 0, "tie_word_embeddings": True}))
    (folder / "remote.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    state = torch.load(source / "final_model.pt", weights_only=True)
    tensors = {f"circuit_model.{key}": value.clone() for key, value in state.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    parts = {f"model-{i + 1:05}-of-{shards:05}.safetensors": sorted(tensors)[i::shards] for i in range(shards)}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def assert_matches(model, name):
    wanted = expected(name)
    with torch.no_grad():
        residuals, logits = as_residual(model).residuals(wanted["input_ids"])
    torch.testing.assert_close(logits, wanted["logits"], rtol=0, atol=1e-5)
    for ours, theirs in zip(residuals, wanted["residuals"], strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_release_is_matched_at_every_residual(name):
    model = SparseTransformer.from_pretrained(FIXTURES / name)
    assert not model.training and model.name_or_path == str(FIXTURES / name)
    assert_matches(model, name)


@pytest.mark.parametrize("shards", [1, 3])
def test_the_hub_layout_is_matched(tmp_path, name, shards):
    assert_matches(SparseTransformer.from_pretrained(hub_folder(tmp_path / "hub", name, shards)), name)


def test_a_published_network_saved_again_is_the_same(tmp_path, name):
    SparseTransformer.from_pretrained(FIXTURES / name).save_pretrained(tmp_path)
    again = SparseTransformer.from_pretrained(tmp_path)
    assert again.config.model_type == "sparse_transformer" and again.config.tied_unembed == (name == NAMES[2])
    assert_matches(again, name)


@pytest.mark.parametrize("trust", [None, False, True])
def test_remote_code_is_never_run(tmp_path, trust):
    folder = hub_folder(tmp_path / "hub", NAMES[0])
    options = {} if trust is None else {"trust_remote_code": trust}
    for load in (SparseTransformer.from_pretrained, AutoModelForCausalLM.from_pretrained):
        model = load(folder, **options)
        assert type(model) is SparseTransformer
        assert_matches(model, NAMES[0])
    assert type(AutoConfig.from_pretrained(folder, **options)) is SparseConfig
    assert not (folder / "ran").exists()


def test_dtype_is_converted_and_a_missing_final_bias_is_zero():
    model = SparseTransformer.from_pretrained(FIXTURES / NAMES[1], dtype=torch.float64, device_map="cpu")
    assert model.dtype == torch.float64
    assert not model.final_logits_bias.any()  # absent from the file


def test_keys_left_out_have_the_releases_defaults():
    config = published_config({"d_model": 24}, "x")
    assert (config.n_head, config.d_head, config.d_mlp, config.n_layer) == (12, 2, 96, 12)
    assert (config.rms_norm, config.tied_unembed, config.sink, config.afrac) == (False, True, False, None)
    assert config.afrac_loctypes == "attn_in,attn_out,mlp_in,mlp_out" and config.tokenizer_name == "tinypython_2k"
    assert (config.bias, config.ln_bias, config.block_size, config.vocab_size) == (True, True, 1024, 50304)


def test_a_causal_mask_buffer_is_ignored(release):
    change(release, {"use_tied_aux_matrix": False}, {"transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32).tril()})
    assert_matches(SparseTransformer.from_pretrained(release), NAMES[0])


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"rotary": True}, r"beeg_config\.json: rotary=True is not a key"),
        ({"use_tied_aux_matrix": True}, "use_tied_aux_matrix=True is not supported"),
        ({"activation_type": "silu"}, "activation_type='silu' must be gelu or relu"),
        ({"n_mlp": 64}, "disagree"),
    ],
)
def test_unknown_configurations_are_refused_by_key(release, keys, message):
    change(release, keys)
    with pytest.raises(ValueError, match=message) as caught:
        SparseTransformer.from_pretrained(release)
    assert "\n" not in str(caught.value) and "beeg_config.json" in str(caught.value)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"transformer.h.1.attn.attn_imp.sink_logit": None}, "attn_imp.sink_logit is missing"),
        ({"lm_head.weight": None}, "the tensor lm_head.weight is missing"),
        ({"transformer.wte.weight": None}, "the tensor transformer.wte.weight is missing"),
        ({"transformer.h.0.ln_3.weight": torch.ones(32)}, "ln_3.weight is not expected"),
        ({"lm_head.weight": torch.ones(32, 61)}, r"lm_head.weight has shape \[32, 61\], not \[61, 32\]"),
        ({"final_logits_bias": torch.ones(61, dtype=torch.long)}, "final_logits_bias holds torch.int64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(release, tensors, message):
    change(release, tensors=tensors)
    with pytest.raises(ValueError, match=message) as caught:
        SparseTransformer.from_pretrained(release)
    assert "\n" not in str(caught.value) and "final_model.pt" in str(caught.value)


def test_tied_embeddings_that_differ_are_refused(tmp_path):
    shutil.copytree(FIXTURES / NAMES[2], tmp_path / "c")
    change(tmp_path / "c", tensors={"lm_head.weight": torch.ones(61, 32)})
    with pytest.raises(ValueError, match=r"tied_unembed is true, but transformer.wte.weight and lm_head.weight differ"):
        SparseTransformer.from_pretrained(tmp_path / "c")
    change(tmp_path / "c", tensors={"lm_head.weight": None})
    assert_matches(SparseTransformer.from_pretrained(tmp_path / "c"), NAMES[2])


@pytest.mark.parametrize("kept, message", [(0, "is empty"), (0.5, "is damaged"), (0.99, "is damaged")])
def test_a_release_cut_short_is_refused(release, kept, message):
    weights = release / "final_model.pt"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=rf"final_model\.pt {message}") as caught:
        SparseTransformer.from_pretrained(release)
    assert "\n" not in str(caught.value)


class Code:
    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize("content", [Code(), {"a": 1}, [torch.ones(1)]])
def test_a_file_of_anything_but_tensors_is_refused_and_runs_nothing(release, content, monkeypatch):
    monkeypatch.chdir(release)
    torch.save(content, release / "final_model.pt")
    with pytest.raises(ValueError, match="plain state dict"):
        SparseTransformer.from_pretrained(release)
    assert not (release / "ran").exists()


def test_a_missing_file_is_named(release, tmp_path):
    (release / "final_model.pt").unlink()
    with pytest.raises(OSError, match=r"final_model\.pt does not exist"):
        SparseTransformer.from_pretrained(release)
    hub = hub_folder(tmp_path / "hub", NAMES[0], shards=2)
    (hub / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(OSError, match=r"model-00002-of-00002\.safetensors does not exist"):
        SparseTransformer.from_pretrained(hub)


def test_hub_tensors_outside_the_prefix_are_refused(tmp_path):
    hub = hub_folder(tmp_path / "hub", NAMES[0])
    save_file({"lm_head.weight": torch.ones(61, 32)}, hub / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight is not expected; every name must begin with circuit_model"):
        SparseTransformer.from_pretrained(hub)


def test_a_damaged_configuration_is_refused(release):
    (release / "beeg_config.json").write_text('{"block_size": 3')
    with pytest.raises(ValueError, match=r"beeg_config\.json is not valid JSON"):
        SparseTransformer.from_pretrained(release)
    (release / "beeg_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"beeg_config\.json"):
        SparseTransformer.from_pretrained(release)
