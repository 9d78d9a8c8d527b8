"""Whole files are read back equal, damaged ones are refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bridges.io.tensors import (
    INDEX,
    check_tensors,
    read_keys,
    read_safetensors,
    read_safetensors_folder,
    read_torch_file,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def same(found):
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_tensors_are_read_from_one_file_from_shards_and_from_a_state_dict(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert same(read_safetensors(tmp_path / "model.safetensors")) and same(read_safetensors_folder(tmp_path))
    torch.save(TENSORS, tmp_path / "model.pt")
    assert same(read_torch_file(tmp_path / "model.pt"))
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    for name in TENSORS:
        save_file({name: TENSORS[name]}, sharded / f"{name}.safetensors")
    (sharded / INDEX).write_text(json.dumps({"weight_map": {name: f"{name}.safetensors" for name in TENSORS}}))
    assert same(read_safetensors_folder(sharded))


def test_an_index_cannot_name_files_outside_its_folder(tmp_path):
    save_file(TENSORS, tmp_path / "outside.safetensors")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / INDEX).write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"in/outside.safetensors does not exist"):
        read_safetensors_folder(tmp_path / "in")


@pytest.mark.parametrize("read", [read_safetensors, read_torch_file])
@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "does not exist"),
        (b"", ValueError, r"is empty \(0 bytes\)"),
        (b"not tensors", ValueError, "fetch it again"),
    ],
)
def test_missing_empty_and_damaged_files_are_refused_by_name(tmp_path, read, content, error, message):
    path = tmp_path / "weights"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message) as refusal:
        read(path)
    assert str(path) in str(refusal.value)


def test_a_cut_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_safetensors(path)


class Harmful:
    def __reduce__(self):
        return print, ("code in a checkpoint ran",)


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {"a": Harmful()}])
def test_a_pickle_of_anything_else_is_refused_and_does_not_run(tmp_path, capsys, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="plain state dict"):
        read_torch_file(tmp_path / "model.pt")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(("text", "message"), [("[1]", "must hold a JSON object, not a list"), ("{", "keys.json")])
def test_keys_that_are_not_a_json_object_are_refused(tmp_path, text, message):
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_keys(tmp_path / "keys.json")


def test_an_index_without_a_map_is_refused(tmp_path):
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        read_safetensors_folder(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.zeros(2)}, "the tensor b is missing"),
        ({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}, "the tensor c is not expected"),
        ({"a": torch.zeros(2), "b": torch.zeros(4)}, r"the tensor b has shape \[4\], not \[3\]"),
        ({"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.long)}, r"the tensor b holds torch\.int64"),
    ],
)
def test_tensors_that_differ_from_the_configuration_are_refused_by_name(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        check_tensors(tensors, {"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path)


def test_tensors_of_another_float_dtype_fit(tmp_path):
    check_tensors({"a": torch.zeros(2, dtype=torch.bfloat16)}, {"a": torch.zeros(2)}, tmp_path)
