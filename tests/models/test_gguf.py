"""A GGUF file, or a folder of one, is a model as any other: weights, tokenizer and name are found."""

import shutil
from pathlib import Path

import pytest
import torch
from gguf_files import WORDS, tiny_llama, write_gguf

from bridges.bridge import Bridge, BridgeSet
from bridges.io.fingerprint import fingerprint
from bridges.models import loading


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_llama()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("downloads") / "tiny.gguf"
    write_gguf(model, path)
    return path


def test_its_weights_are_those_of_the_model_in_float32(model, file):
    ids = torch.tensor([[0, 1, 2, 4]])
    for source, kwargs in ((file, {}), (str(file), {}), (file.parent, {}), (file.parent, {"gguf_file": file.name})):
        loaded = loading.load_model(source, "cpu", **kwargs)
        assert fingerprint(loaded) == fingerprint(model) and loaded.dtype == torch.float32 and not loaded.training
        with torch.no_grad():
            assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    assert loading.as_residual(file, dtype=torch.float64).dtype == torch.float64


def test_it_is_found_from_the_home_folder_and_however_it_is_written(model, file, tmp_path, monkeypatch):
    shutil.copy(file, tmp_path / "q.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("~/q.gguf", "./q.gguf", "q.gguf", ".", Path("q.gguf")):
        assert fingerprint(loading.load_model(path)) == fingerprint(model)


def test_its_tokenizer_is_found_by_path_and_from_the_model(file):
    chain = loading.as_residual(file)
    for source in (file, str(file), file.parent, chain, chain.model):
        tokenizer = loading.find_tokenizer(source)
        assert (
            tokenizer.get_vocab() == {word: i for i, word in enumerate(WORDS)}
            and tokenizer.eos_token == "<|endoftext|>"
        )
        assert tokenizer("abc").input_ids[-2:] == [4, 3]


def test_its_file_name_is_recorded(file):
    bridge_set = BridgeSet([("final", "final")], [Bridge(32, 32, k=2)])
    chain = loading.as_residual(file.parent)
    bridge_set.record_models(chain, chain)
    assert bridge_set.provenance["dense"]["name"] == "tiny.gguf"


def test_other_weights_in_the_folder_come_first(tiny, file, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    shutil.copy(file, tmp_path / "tiny.gguf")
    assert fingerprint(loading.load_model(tmp_path)) == fingerprint(tiny("llama"))
    assert fingerprint(loading.load_model(tmp_path / "tiny.gguf")) != fingerprint(tiny("llama"))


def test_several_files_are_told_apart_by_name(model, file, tmp_path):
    for name in ("q4.gguf", "q8.gguf"):
        shutil.copy(file, tmp_path / name)
    with pytest.raises(ValueError, match=r"holds 2 GGUF files; give one, such as '.*/q4.gguf'"):
        loading.load_model(tmp_path)
    assert loading.find_tokenizer(tmp_path) is None
    loaded = loading.load_model(tmp_path, gguf_file="q8.gguf")
    assert fingerprint(loaded) == fingerprint(model) and loading.find_tokenizer(loaded).eos_token == "<|endoftext|>"


def test_what_is_missing_is_said_in_one_line(file, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"path='other.gguf' must be a GGUF file that exists"):
        loading.load_model("other.gguf")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    for load in (loading.load_model, loading.find_tokenizer):
        with pytest.raises(ValueError, match=r"tiny.gguf' is read with the package gguf, .* 'sparse-bridges\[gguf\]'"):
            load(file)
