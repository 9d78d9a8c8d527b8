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


def test_an_object_is_itself_whatever_else_is_asked(tiny):
    model = tiny("gpt2").train()
    assert loading.load_model(model, torch.device("meta")) is model and model.training


def test_a_folder_is_loaded_in_evaluation_mode_with_its_settings(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    for place in (tmp_path, str(tmp_path)):
        loaded = loading.load_model(place, torch.device("cpu"))
        assert isinstance(loaded, LlamaForCausalLM) and not loaded.training and same_weights(loaded, tiny("llama"))
    half = loading.load_model(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and same_weights(tiny("llama"), half)


def test_a_loaded_model_goes_to_the_device_unless_a_map_says_where(tiny, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path)
    assert loading.load_model(tmp_path, torch.device("meta")).device.type == "meta"
    assert loading.load_model(tmp_path, torch.device("meta"), device_map={"": "cpu"}).device.type == "cpu"


def test_a_sparse_folder_is_known_as_one(tmp_path):
    torch.manual_seed(0)
    model = SparseTransformer(SparseConfig(**SHAPE)).eval()
    model.save_pretrained(tmp_path)
    loaded = loading.load_model(tmp_path)
    assert type(loaded) is SparseTransformer and same_weights(loaded, model)


def test_nothing_there_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        loading.load_model(tmp_path / "nothing")


def test_a_tokenizer_is_found_where_the_model_lies(tiny):
    folder = Path(bridges.__file__).parent / "assets" / "tokenizer"
    model = tiny("gpt2")
    assert loading.find_tokenizer(model) is None  # made in memory: it lies nowhere
    assert loading.find_tokenizer(nn.Linear(2, 2)) is None
    model.config._name_or_path = str(folder)
    found = [loading.find_tokenizer(place) for place in (model, folder, str(folder))]
    assert len({len(tokenizer) for tokenizer in found}) == 1 and found[0].eos_token == "<|endoftext|>"


def test_a_hub_id_without_a_tokenizer_has_none(monkeypatch):
    """transformers would make an empty one of a kind that it guesses from the model's."""
    asked = []
    monkeypatch.setattr(loading, "cached_file", lambda place, name, **_: asked.append((place, name)))
    assert loading.find_tokenizer("me/model") is None
    assert {place for place, _ in asked} == {"me/model"} and {"tokenizer.json", "vocab.json"} <= {n for _, n in asked}
    monkeypatch.setattr(loading, "cached_file", lambda place, name, **_: name)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda place: f"that of {place}")
    assert loading.find_tokenizer("me/model") == "that of me/model"


def test_a_folder_without_a_tokenizer_has_none(tiny, tmp_path):
    assert loading.find_tokenizer(tmp_path) is None
    model = tiny("gpt2")
    model.config._name_or_path = str(tmp_path)
    assert loading.find_tokenizer(model) is None
    model.config._name_or_path = "someone/not-here"  # an object's hub id is not looked up
    assert loading.find_tokenizer(model) is None
