"""A bridge folder: saved, loaded, damaged, and on the hub."""

import filecmp
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bridge import K, filled, filled_set, same_folders

import bridges.bridge
from bridges.bridge import BridgeSet


@pytest.fixture
def bridge_set():
    return filled_set()


def test_save_load_save_gives_the_same_bytes(bridge_set, tmp_path):
    bridge_set.save_pretrained(tmp_path / "a")
    loaded = BridgeSet.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    names = ["README.md", "bridges.safetensors", "config.json", "history.json", "report.json"]
    assert sorted(same_folders(tmp_path / "a", tmp_path / "b")) == names == sorted(os.listdir(tmp_path / "b"))
    assert loaded.site_pairs == bridge_set.site_pairs and loaded.report == bridge_set.report
    assert loaded.history == bridge_set.history and loaded.provenance == bridge_set.provenance
    for name, tensor in bridge_set.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor) and loaded.tensors()[name].dtype == tensor.dtype
    assert [b.k for b in loaded] == [K] * 3 and loaded[0].encoder_weight.requires_grad


def test_a_folder_with_settings_that_have_left_loads_and_is_saved_as_it_was(tmp_path):
    """The bundled bridges, with the interchange loss in settings and history as earlier versions wrote it."""
    bundled, loss = Path(bridges.bridge.__file__).parent / "assets/bridges", "train/interchange/final"
    shutil.copytree(bundled, tmp_path / "a")
    left = {"interchange_weight": 0.05, "interchange_pairs": 512}
    for name, table in (("config.json", "fit"), ("report.json", "settings")):
        content = json.loads((tmp_path / "a" / name).read_text())
        content[table] |= left
        (tmp_path / "a" / name).write_text(json.dumps(content))
    history = json.loads((tmp_path / "a/history.json").read_text())
    (tmp_path / "a/history.json").write_text(json.dumps([{**row, loss: 0.5} for row in history]))
    loaded = BridgeSet.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    again = BridgeSet.from_pretrained(tmp_path / "b")
    for one in (loaded, again):
        assert one.report is not None and one.report.mean == BridgeSet.from_pretrained(bundled).report.mean
        assert left.items() <= one.provenance["fit"].items() and left.items() <= one.report.settings.items()
        assert {row[loss] for row in one.history} == {0.5}
    assert filecmp.cmp(bundled / "bridges.safetensors", tmp_path / "b/bridges.safetensors", shallow=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_set_without_a_report_is_loaded_without_one(dtype, tmp_path):
    BridgeSet([("0.attn", "0.attn")], [filled(dtype=dtype)]).save_pretrained(tmp_path / "a")
    loaded = BridgeSet.from_pretrained(str(tmp_path / "a"))
    loaded.save_pretrained(tmp_path / "b")
    assert len(same_folders(tmp_path / "a", tmp_path / "b")) == 4
    assert loaded.report is None and loaded.history == [] and loaded[0].encoder_weight.dtype == dtype


def test_the_content_of_a_bridge_folder(bridge_set, tmp_path):
    bridge_set.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "format_version": 3,
        "pairs": [["0.attn", "0.attn"], ["1.block", "2.attn"], ["final", "final"]],
        "d_dense": 5,
        "d_sparse": 7,
        "k": 3,
        "dtype": "float64",
        "dense": {"name": "d", "fingerprint": "bf16:1 fp16:2"},
        "settings": {"steps": 3},
    }
    stored = load_file(tmp_path / "bridges.safetensors")
    parts = [
        "encoder_weight",
        "encoder_bias",
        "decoder_weight",
        "decoder_bias",
        "rms_dense",
        "rms_sparse",
        "gain_sparse",
        "median_dense",
        "median_sparse",
        "norm_limit_dense",
        "norm_limit_sparse",
    ]
    assert set(stored) == {f"{site}.{part}" for site in bridge_set.sites for part in parts}
    assert stored["2.attn.rms_dense"].item() == 2.5


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
    path.write_text(json.dumps(config))


TENSORS, CONFIG = "bridges.safetensors", "config.json"
DAMAGES = {
    "cut": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-20]), rf"{TENSORS} is not a whole safe"),
    "empty": (lambda f: (f / TENSORS).write_bytes(b""), rf"{TENSORS} is empty"),
    "no safetensors": (lambda f: (f / TENSORS).write_text("x" * 99), rf"{TENSORS} is not a whole safe"),
    "gone": (lambda f: (f / TENSORS).unlink(), rf"{TENSORS} does not exist"),
    "one missing": (
        lambda f: rewrite(f / TENSORS, lambda t: t.pop("final.decoder_bias")),
        "tensor final.decoder_bias is missing",
    ),
    "one too many": (
        lambda f: rewrite(f / TENSORS, lambda t: t.update({"0.mlp.decoder_bias": torch.ones(2)})),
        "tensor 0.mlp.decoder_bias is not expected",
    ),
    "misshapen": (
        lambda f: rewrite(f / TENSORS, lambda t: t.update({"final.decoder_bias": torch.ones(2)})),
        r"tensor final.decoder_bias has shape \[2\], not \[5\]",
    ),
    "no config": (lambda f: (f / CONFIG).unlink(), "is not a bridge folder: it has no config.json"),
    "torn config": (lambda f: (f / CONFIG).write_text('{"k": '), "config.json is not valid JSON"),
    "another version": (lambda f: edit_config(f, format_version=1), r"config.json: format_version=1, .* reads 2"),
    "no width": (lambda f: edit_config(f, d_dense=None), "config.json lacks 'd_dense'"),
    "no dtype": (lambda f: edit_config(f, dtype="nn"), "config.json: dtype='nn' is not a dtype"),
    "a list for a config": (lambda f: (f / CONFIG).write_text("[]"), "config.json must hold a JSON object"),
    "odd pairs": (lambda f: edit_config(f, pairs=[["0.attn"]]), "config.json: pairs must be a list of"),
    "odd width": (lambda f: edit_config(f, d_dense="5"), "config.json: pairs must be a list of"),
    "a list for a report": (lambda f: (f / "report.json").write_text("[]"), "report.json must hold a JSON object"),
    "torn report": (lambda f: (f / "report.json").write_text("{"), "report.json is not valid JSON"),
    "odd report": (lambda f: (f / "report.json").write_text("{}"), "report.json is not a report"),
    "torn history": (lambda f: (f / "history.json").write_text("["), "history.json is not valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(damage, bridge_set, tmp_path):
    bridge_set.save_pretrained(tmp_path)
    act, message = DAMAGES[damage]
    act(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        BridgeSet.from_pretrained(tmp_path)


def test_a_folder_is_found_however_it_is_written(bridge_set, tmp_path, monkeypatch):
    bridge_set.save_pretrained(tmp_path / "b")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("~/b", "./b", "b", tmp_path / "b"):
        assert BridgeSet.from_pretrained(path).sites == bridge_set.sites
    for path in (tmp_path / "nothing", "~/nothing", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="must be an existing folder or a hub id"):
            BridgeSet.from_pretrained(path)


def test_a_hub_id_is_downloaded_with_its_revision(bridge_set, tmp_path, monkeypatch):
    bridge_set.save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path))
    assert BridgeSet.from_pretrained("someone/bridges", revision="v1").sites == bridge_set.sites
    assert asked == [(("someone/bridges",), {"revision": "v1"})]


def test_push_to_hub_uploads_the_bridge_folder(bridge_set, tmp_path, monkeypatch):
    bridge_set.save_pretrained(tmp_path / "here")
    asked = {}

    class Api:
        def __init__(self, token=None):
            asked["token"] = token

        def create_repo(self, repo_id, **options):
            asked["created"] = (repo_id, options)
            return SimpleNamespace(repo_id=f"someone/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            asked["uploaded"], asked["folder"] = repo_id, folder_path
            asked["same"] = sorted(same_folders(folder_path, tmp_path / "here"))
            return SimpleNamespace(commit_url="address of the commit")

    monkeypatch.setattr(bridges.bridge, "HfApi", Api)
    assert bridge_set.push_to_hub("mine", private=True, token="secret") == "address of the commit"
    assert asked["created"] == ("mine", {"private": True, "exist_ok": True}) and asked["token"] == "secret"
    assert asked["uploaded"] == "someone/mine" and len(asked["same"]) == 5
    assert not os.path.exists(asked["folder"])


def test_the_folder_around_a_bridge_folder_names_it(bridge_set, tmp_path):
    bridge_set.save_pretrained(tmp_path / "bridges")
    with pytest.raises(FileNotFoundError, match=f"has no config.json; '{tmp_path}/bridges' is one"):
        BridgeSet.from_pretrained(tmp_path)


def test_a_bridge_folder_given_as_a_model_is_said_to_be_one(bridge_set, tmp_path):
    bridge_set.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"path='{tmp_path}' holds bridges, not a model; give the folder or hub id of"):
        bridges.as_residual(tmp_path)
