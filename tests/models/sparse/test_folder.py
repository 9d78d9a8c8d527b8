import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridges.models.sparse.model import SparseConfig, SparseTransformer

SHAPE = {"vocab_size": 11, "block_size": 8, "n_layer": 1, "d_model": 16}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SparseTransformer(SparseConfig(**SHAPE)).eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def same(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_shards_are_read(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert same(model, SparseTransformer.from_pretrained(tmp_path))


def test_a_hub_id_is_downloaded_without_code(model, folder, tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repo, **options):
        asked.update(repo=repo, **options)
        shutil.copytree(folder, tmp_path / "cache" / "inner")
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    again = SparseTransformer.from_pretrained("someone/sparse", subfolder="inner", revision="v1", token="t")
    assert same(model, again) and again.name_or_path == "someone/sparse"
    patterns = asked.pop("allow_patterns")
    assert asked == {"repo": "someone/sparse", "revision": "v1", "token": "t"}
    assert "inner/config.json" in patterns and not any(pattern.endswith((".py", "*")) for pattern in patterns)


def test_the_folders_generation_config_and_a_given_config_are_used(model, folder):
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(folder)
    config = SparseConfig(**SHAPE, dropout=0.3)
    again, info = SparseTransformer.from_pretrained(folder, config=config, output_loading_info=True)
    assert again.generation_config.max_new_tokens == 3 and again.config.dropout == 0.3
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_model_is_built_from_a_state_dict(model):
    again = SparseTransformer.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert same(model, again)


def test_a_folder_is_found_however_it_is_written(model, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    for path in ("~/own", "./own", "own", folder, str(folder)):
        assert same(model, SparseTransformer.from_pretrained(path))


def test_a_folder_that_does_not_exist_or_holds_no_model_is_refused(tmp_path):
    for path in (tmp_path / "nothing", "./nothing"):
        with pytest.raises(OSError, match="must be an existing folder or a hub id"):
            SparseTransformer.from_pretrained(path)
    with pytest.raises(OSError, match=r"has neither config\.json nor beeg_config\.json"):
        SparseTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"model_type": "gpt2"}, r"config\.json has model_type='gpt2'; a SparseTransformer needs"),
        ({"rotary": 1}, r"config\.json: rotary=1 is not a key"),
        ({"n_layer": 2}, r"the tensor transformer\.h\.1\.ln_1\.weight is missing"),
        ({"sink": False}, r"attn_imp\.sink_logit is not expected"),
        ({"vocab_size": 12}, r"has shape \[11\], not \[12\]"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folder, keys, message):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    with pytest.raises(ValueError, match=message):
        SparseTransformer.from_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 5, 0.5])
def test_weights_cut_short_are_refused_in_one_line(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: kept if kept >= 1 else int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"model\.safetensors is (empty|not a whole)") as caught:
        SparseTransformer.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_never_filled_in(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.h.0.mlp.c_fc.bias"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp\.c_fc\.bias is missing"):
        SparseTransformer.from_pretrained(folder)
