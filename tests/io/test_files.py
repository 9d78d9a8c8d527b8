import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file

from bridges.io.files import read_json, read_toml, replacing, write_json, write_tensors, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(KeyError), replacing(path) as temporary:
        assert temporary.parent == path.parent  # one file system, so that renaming is atomic
        temporary.write_text("half of")
        raise KeyError
    assert read_json(path) == {"old": 1} and os.listdir(path.parent) == ["x.json"]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["x.txt"]


def test_a_folder_replaces_another_only_when_it_is_whole(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "stale").write_text("")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("")
        raise KeyError
    assert os.listdir(tmp_path) == ["run"] and os.listdir(path) == ["stale"]
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "fresh").write_text("")
    assert os.listdir(tmp_path) == ["run"] and os.listdir(path) == ["fresh"]


def test_json_is_readable_text_with_the_same_bytes_each_time(tmp_path):
    for name in ("a", "b"):
        write_json(tmp_path / name, {"z": [1, 0.1], "a": "é"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_text(encoding="utf-8") == '{\n  "z": [\n    1,\n    0.1\n  ],\n  "a": "é"\n}\n'
    assert read_json(tmp_path / "a") == {"z": [1, 0.1], "a": "é"}


def test_numbers_that_json_does_not_know_are_null_wherever_they_stand(tmp_path):
    value = {"nan": math.nan, "rows": [{"loss": -math.inf, "step": 1}, (math.inf, 0.5)], "text": "NaN", "yes": True}
    write_json(tmp_path / "x.json", value)

    def refuse(constant):
        raise AssertionError(f"a browser does not parse {constant}")

    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert read == {"nan": None, "rows": [{"loss": None, "step": 1}, [None, 0.5]], "text": "NaN", "yes": True}
    assert math.isnan(value["nan"]), "the value itself is left alone"


def test_damaged_json_is_refused_by_name(tmp_path):
    (tmp_path / "torn.json").write_text('{"a": [1,')
    with pytest.raises(ValueError, match=r"torn.json is not valid JSON .* cut short"):
        read_json(tmp_path / "torn.json")


def test_toml_is_read_and_what_cannot_be_read_is_refused_by_name(tmp_path):
    (tmp_path / "run.toml").write_text("[fit]\nsteps = 3\n")
    assert read_toml(tmp_path / "run.toml") == {"fit": {"steps": 3}}
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ValueError, match=r"bad\.toml is not valid TOML"):
        read_toml(tmp_path / "bad.toml")
    with pytest.raises(FileNotFoundError, match=r"none\.toml' must be a TOML file that exists"):
        read_toml(str(tmp_path / "none.toml"))


def test_tensors_come_back_whatever_their_strides_and_gradients(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    tensors = {
        "plain": base,
        "transposed": base.T,
        "with gradient": base.clone().requires_grad_(),
        "half": base.bfloat16(),
    }
    write_tensors(tmp_path / "t.safetensors", tensors)
    stored = load_file(tmp_path / "t.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype
    assert os.listdir(tmp_path) == ["t.safetensors"]
