"""A bridge as a SAELens folder, read back by a reader written from SAELens' documentation."""

import json

import pytest
import torch
from pairs import naive_abs_topk
from safetensors.torch import load_file, save_file

import bridges
from bridges.interop.sae_lens import CONFIG_FILE, MEASURED_FILE, WEIGHTS_FILE, export_sae, load_sae


@pytest.fixture
def folder(pair, tmp_path):
    export_sae(pair.bridge_set, "1.mlp", tmp_path / "sae")
    return tmp_path / "sae"


def reencoded(folder, x):
    """A SAE's features and reconstruction, from the folder alone: x W_enc + b_enc, AbsTopK, z W_dec + b_dec."""
    config, weights = json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / WEIGHTS_FILE)
    z = naive_abs_topk(x @ weights["W_enc"] + weights["b_enc"], config["k"])
    return z, z @ weights["W_dec"] + weights["b_dec"]


def test_a_reader_of_the_folder_alone_computes_what_the_bridge_does(pair, folder):
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    features, output = reencoded(folder, x)
    bridge = pair.bridge_set["1.mlp"]
    torch.testing.assert_close(features, bridge.encode(x))
    torch.testing.assert_close(output, bridge.decode(bridge.encode(x)))
    assert ((features != 0).sum(-1) == bridge.k).all() and (features < 0).any()


def test_the_config_is_of_the_layout_of_saelens_6(pair, folder):
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert (
        config.pop("metadata").items()
        >= {
            "sae_lens_version": "6.53.0",
            "hook_name": "blocks.1.hook_resid_mid",
            "dense_site": "1.mlp",
            "sparse_site": "1.mlp",
        }.items()
    )
    assert config == {
        "architecture": "abstopk",
        "d_in": 8,
        "d_sae": 12,
        "k": 4,
        "dtype": "float64",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    assert shapes == {"W_enc": (8, 12), "b_enc": (12,), "W_dec": (12, 8), "b_dec": (8,)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_comes_back_bit_for_bit_and_written_again_gives_the_same_bytes(pair, tmp_path, dtype):
    bridge = bridges.Bridge(8, 12, 4)
    bridge.load_state_dict(pair.bridge_set[0].state_dict())
    bridge_set = bridges.BridgeSet([("0.attn", "0.attn")], [bridge.to(dtype)])
    export_sae(bridge_set, 0, tmp_path / "one")
    back = load_sae(tmp_path / "one")
    assert back.k == 4 and back.state_dict().keys() == bridge.state_dict().keys()
    for name, tensor in bridge.state_dict().items():
        assert back.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(back.state_dict()[name].nan_to_num(), tensor.nan_to_num()), name
    export_sae(bridges.BridgeSet([("0.attn", "0.attn")], [back]), 0, tmp_path / "two")
    for file in (CONFIG_FILE, WEIGHTS_FILE, MEASURED_FILE):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_hooks_are_those_of_the_stream_before_each_sublayer(pair, tmp_path):
    def hook(site, **options):
        export_sae(pair.bridge_set, site, tmp_path, **options)
        return json.loads((tmp_path / CONFIG_FILE).read_text())["metadata"]["hook_name"]

    assert [hook(site) for site in ("0.attn", "0.mlp", "1.attn")] == [
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_resid_mid",
        "blocks.1.hook_resid_pre",
    ]
    assert hook("final", dense=pair.dense) == "blocks.1.hook_resid_post"
    blocks = bridges.BridgeSet([("3.block", "0.attn")], [pair.bridge_set[0]])
    export_sae(blocks, 0, tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["metadata"]["hook_name"] == "blocks.3.hook_resid_pre"


def test_the_models_name_is_the_bridges_own_or_the_given_one(tmp_path):
    bridge_set = bridges.load_bridges()
    for options, name in (({}, bridge_set.provenance["dense"]["name"]), ({"model_name": "gpt2"}, "gpt2")):
        export_sae(bridge_set, "0.mlp", tmp_path, **options)
        assert json.loads((tmp_path / CONFIG_FILE).read_text())["metadata"]["model_name"] == name


def test_a_folder_without_measurements_gives_a_bridge_that_has_none(pair, folder):
    (folder / MEASURED_FILE).unlink()
    back = load_sae(folder)
    assert torch.equal(back.encoder_weight, pair.bridge_set["1.mlp"].encoder_weight)
    assert back.rms_dense.isnan() and back.gain_sparse.isnan().all() and back.norm_limit_dense.isinf()


def test_what_cannot_be_written_is_refused_in_one_line(pair, tmp_path):
    with pytest.raises(ValueError, match=r"site='final' is the output of the dense model's last layer.*pass dense="):
        export_sae(pair.bridge_set, "final", tmp_path)
    with pytest.raises(KeyError, match=r"site='7\.mlp' has no bridge"):
        export_sae(pair.bridge_set, "7.mlp", tmp_path)
    bundled = bridges.load_bridges()
    with pytest.raises(ValueError, match="is not the model that these bridges were fitted to"):
        export_sae(bundled, "final", tmp_path, dense=pair.dense)
    assert not list(tmp_path.iterdir())


def test_what_is_not_a_bridge_is_refused_by_name(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no cfg\.json"):
        load_sae(tmp_path)
    config = json.loads((folder / CONFIG_FILE).read_text())
    for change, message in (
        ({"architecture": "topk"}, "architecture='topk', but a bridge is a SAE with architecture='abstopk'"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input=True"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm=True"),
        ({"k": None}, "k=None must be an integer"),
        ({"dtype": "floaty"}, "dtype='floaty' is not a dtype"),
        ({"d_sae": 13}, r"the tensor W_\w+ has shape \[.*12.*\], not \[.*13.*\]"),
    ):
        (folder / CONFIG_FILE).write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_sae(folder)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    weights = load_file(folder / WEIGHTS_FILE)
    del weights["b_enc"]
    save_file(weights, folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="the tensor b_enc is missing"):
        load_sae(folder)
