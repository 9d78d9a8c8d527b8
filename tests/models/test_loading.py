"""A model is given as an object, a ResidualModel, a folder or a hub id, to every function alike."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import bridges
from bridges.models import loading
from bridges.models.sparse.model import SparseConfig, SparseTransformer

SHAPE = {"vocab_size": 19, "block_size": 9, "n_layer": 1, "d_model": 16, "n_head": 2, "d_head": 4, "d_mlp": 24}


def same_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].to(t), t) for name, t in theirs.items())


def tiny_sparse():
    torch.manual_seed(0)
    return SparseTransformer(SparseConfig(**SHAPE)).eval()


def test_an_object_is_returned_on_its_device_and_in_its_mode(tiny):
    model = tiny("gpt2").train()
    assert loading.load_model(model, torch.device("meta")) is model and model.training
    chain = loading.as_residual(model)
    assert chain.model is model and loading.load_model(chain) is model and loading.as_residual(chain) is chain


def test_a_folder_is_loaded_in_evaluation_mode_with_its_settings(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        loaded = loading.load_model(folder, torch.device("cpu"))
        assert isinstance(loaded, LlamaForCausalLM) and not loaded.training and same_weights(loaded, tiny("llama"))
    half = loading.load_model(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and same_weights(tiny("llama"), half)


def test_a_loaded_model_goes_to_the_device_unless_there_is_a_device_map(tiny, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path)
    assert loading.load_model(tmp_path, torch.device("meta")).device.type == "meta"
    assert loading.load_model(tmp_path, "meta", device_map={"": "cpu"}).device.type == "cpu"


@pytest.mark.parametrize("build", [tiny_sparse, None])
def test_a_folder_is_found_however_it_is_written(build, tiny, tmp_path, monkeypatch):
    model = tiny("gpt2") if build is None else build()
    model.save_pretrained(tmp_path / "b")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for folder in ("~/b", "./b", "b", Path("~/b"), tmp_path / "b"):
        loaded = loading.load_model(folder)
        assert type(loaded) is type(model) and same_weights(loaded, model)
        chain = loading.as_residual(folder, "cpu", dtype=torch.float64)
        assert type(chain.model) is type(model) and chain.dtype == torch.float64


def test_a_hub_id_is_asked_of_the_hub(tiny, monkeypatch):
    asked, model = [], tiny("gpt2")

    def from_pretrained(name, **kwargs):
        asked.append((name, kwargs))
        return model

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    assert loading.as_residual("me/model", revision="v1").model is model
    assert loading.load_model("gpt2") is model
    assert asked == [("me/model", {"revision": "v1"}), ("gpt2", {})]


def test_a_sparse_model_is_its_own_chain():
    model = tiny_sparse()
    chain = loading.as_residual(model)
    assert chain.model is model and chain.sites == ["0.attn", "0.mlp", "final"]


@pytest.mark.parametrize("family", ["sparse", "gpt2"])
def test_of_a_compiled_model_the_model_inside_is_the_chain(family, tiny):
    model = tiny_sparse() if family == "sparse" else tiny(family)
    chain, plain = loading.as_residual(torch.compile(model, backend="eager")), loading.as_residual(model)
    assert chain.model is model and chain.sites == plain.sites and type(chain) is type(plain)


def test_a_model_that_is_not_there_or_of_another_kind_is_refused(tmp_path, unchecked):
    for load in (loading.load_model, loading.as_residual, loading.find_tokenizer):
        with pytest.raises(FileNotFoundError, match="nothing' must be an existing folder or a hub id"):
            load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="model=None must be a model object, a ResidualModel, a folder or a hub id"):
        loading.load_model(None)


def test_a_folder_without_a_model_is_refused_with_what_it_lacks(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ValueError, match=f"path='{tmp_path}' holds no model: it has no config.json; give a folder"):
        loading.load_model(tmp_path)


def test_a_tokenizer_is_found_in_the_models_folder(tiny, monkeypatch):
    folder = Path(bridges.__file__).parent / "assets" / "tokenizer"
    model = tiny("gpt2")
    assert loading.find_tokenizer(model) is None  # made in memory, it has no folder
    assert loading.find_tokenizer(nn.Linear(2, 2)) is None
    model.config._name_or_path = str(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    sources = (model, loading.as_residual(model), folder, str(folder), "~/tokenizer")
    found = [loading.find_tokenizer(source) for source in sources]
    assert len({len(tokenizer) for tokenizer in found}) == 1 and found[0].eos_token == "<|endoftext|>"


def test_an_unusual_name_of_a_model_leads_to_no_tokenizer(tiny, tmp_path):
    """What `name_or_path` holds is not always a folder: a file of weights, nothing, a folder without a tokenizer."""
    (tmp_path / "model.bin").touch()
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "model.bin", tmp_path / "empty", tmp_path / "gone", "", ".", "me/model"):
        model = tiny("gpt2")
        model.config._name_or_path = str(name)
        assert loading.find_tokenizer(model) is None, name
    with pytest.raises(NotADirectoryError, match=r"model.bin' is a file; give the folder that it is in"):
        loading.find_tokenizer(tmp_path / "model.bin")


def test_a_hub_id_without_a_tokenizer_has_none(monkeypatch):
    """transformers would make an empty one of a kind that it guesses from the model's."""
    asked = []
    monkeypatch.setattr(loading, "cached_file", lambda path, name, **_: asked.append((path, name)))
    assert loading.find_tokenizer("me/model") is None
    assert {path for path, _ in asked} == {"me/model"} and {"tokenizer.json", "vocab.json"} <= {n for _, n in asked}
    monkeypatch.setattr(loading, "cached_file", lambda path, name, **_: name)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda path: f"that of {path}")
    assert loading.find_tokenizer("me/model") == "that of me/model"


def test_a_folder_without_a_tokenizer_has_none(tiny, tmp_path):
    assert loading.find_tokenizer(tmp_path) is None
    model = tiny("gpt2")
    model.config._name_or_path = str(tmp_path)
    assert loading.find_tokenizer(model) is None
    model.config._name_or_path = "someone/not-here"  # an object's hub id is not looked up
    assert loading.find_tokenizer(model) is None
