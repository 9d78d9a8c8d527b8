import copy
import filecmp
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import bridges.bridge
from bridges.bridge import Bridge, BridgeSet
from bridges.bridge_report import BridgeReport, SiteFigures
from bridges.models.loading import as_residual

D_DENSE, D_SPARSE, K = 5, 7, 3


def filled(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    bridge = Bridge(D_DENSE, D_SPARSE, K, dtype)
    bridge.randomize(generator)
    with torch.no_grad():
        bridge.encoder_bias.normal_(generator=generator)
        bridge.decoder_bias.normal_(generator=generator)
    bridge.rms_dense.fill_(1.5 + seed)
    bridge.rms_sparse.fill_(2.5 + seed)
    bridge.gain_sparse.fill_(0.5 + seed)
    return bridge


@pytest.fixture
def bridge():
    return filled()


@pytest.fixture
def report():
    return BridgeReport((SiteFigures("0.attn", *[0.125 * i for i in range(10)]),), 2.5, 2.75, 0.375, 99, {"steps": 3})


@pytest.fixture
def bridge_set(report):
    pairs = [("0.attn", "0.attn"), ("1.block", "2.attn"), ("final", "final")]
    provenance = {"dense": {"name": "d", "fingerprint": "bf16:1 fp16:2"}, "settings": {"steps": 3}}
    return BridgeSet(pairs, [filled(i) for i in range(3)], provenance, report, [{"step": 1, "train/loss": 0.5}])


def normal(*shape, seed=9):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_encode(bridge, h):
    """One token at a time, as the method writes it."""
    z = torch.zeros(*h.shape[:-1], D_SPARSE, dtype=h.dtype)
    for place in torch.cartesian_prod(*[torch.arange(n) for n in h.shape[:-1]]).view(-1, h.ndim - 1).tolist():
        affine = [sum(w * x for w, x in zip(row, h[tuple(place)], strict=True)) for row in bridge.encoder_weight]
        affine = [(value + bias).item() for value, bias in zip(affine, bridge.encoder_bias, strict=True)]
        kept = sorted(range(D_SPARSE), key=lambda i: (-abs(affine[i]), i))[:K]
        for i in kept:
            z[tuple(place)][i] = affine[i]
    return z


def test_encode_is_affine_and_keeps_k(bridge):
    h = normal(2, 4, D_DENSE)
    with torch.no_grad():
        z = bridge.encode(h)
        torch.testing.assert_close(z, naive_encode(bridge, h), rtol=0, atol=1e-12)
    assert (z != 0).sum(-1).unique().tolist() == [K]


def test_encode_at_equals_those_channels_of_encode(bridge):
    h = normal(2, 4, D_DENSE)
    for channels in ([0], [6, 2, 2]):
        assert torch.equal(bridge.encode_at(h, channels), bridge.encode(h).detach()[..., channels])
    assert not bridge.encode_at(h, [1]).requires_grad


def test_decode_is_affine_and_its_delta_has_no_bias(bridge):
    z, dz = normal(2, 4, D_SPARSE), normal(2, 4, D_SPARSE, seed=10)
    with torch.no_grad():
        expected = torch.einsum("ds,bts->btd", bridge.decoder_weight, z) + bridge.decoder_bias
        torch.testing.assert_close(bridge.decode(z), expected, rtol=0, atol=1e-12)
        delta = bridge.decode_delta(dz)
        torch.testing.assert_close(delta, bridge.decode(z + dz) - bridge.decode(z), rtol=0, atol=1e-12)
        assert torch.equal(bridge.decode_delta(dz * 0), torch.zeros(2, 4, D_DENSE).double())


def test_read_columns_follow_the_formula(bridge):
    bridge.rms_sparse.fill_(1.5)
    bridge.gain_sparse.copy_(normal(D_SPARSE, seed=4))
    columns = bridge.read_columns([6, 2, 2])
    for row, c in zip(columns, (6, 2, 2), strict=True):
        torch.testing.assert_close(row, bridge.decoder_weight[:, c].detach() * 1.5 / bridge.gain_sparse[c])
    assert not columns.requires_grad


def test_streams_are_cast_to_the_dtype_of_the_weights(bridge):
    low = normal(3, D_DENSE).bfloat16()
    with torch.no_grad():
        assert bridge.encode(low).dtype == torch.float64
        assert torch.equal(bridge.encode(low), bridge.encode(low.double()))
        assert bridge.decode(normal(3, D_SPARSE).half()).dtype == torch.float64


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_half_precision_selects_the_channels_of_float32(half):
    """Rounded to bfloat16 before the selection, a third of these tokens would keep other, lower channels."""
    d_dense, d_sparse, k = 64, 512, 128
    bridge, h = Bridge(d_dense, d_sparse, k), normal(200, d_dense).float()
    bridge.randomize(torch.Generator().manual_seed(3))
    if half == "weights":
        bridge, h = bridge.bfloat16(), h.bfloat16()
    with torch.no_grad():
        expected = copy.deepcopy(bridge).float().encode(h.float())
    context = torch.autocast("cpu", torch.bfloat16) if half == "autocast" else nullcontext()
    with context, torch.no_grad():
        z = bridge.encode(h)
        assert torch.equal(bridge.encode_at(h, [5, 500]), z[..., [5, 500]])
    assert z.dtype == bridge.encoder_weight.dtype and torch.equal(z, expected.to(z.dtype))
    assert torch.equal(z != 0, expected != 0) and ((z != 0).sum(-1) == k).all()


def test_gradients_reach_kept_entries_only(bridge):
    h = normal(1, D_DENSE)
    bridge.encode(h).sum().backward()
    kept = (naive_encode(bridge, h)[0] != 0).double()
    assert torch.equal(bridge.encoder_bias.grad, kept)
    assert torch.equal(bridge.encoder_weight.grad, kept[:, None] * h)


@pytest.mark.parametrize("k", [0, -1, D_SPARSE + 1])
def test_an_impossible_k_is_refused(k):
    with pytest.raises(ValueError, match=f"k={k} must lie between 1 and the sparse width 7"):
        Bridge(D_DENSE, D_SPARSE, k)


def test_a_new_bridge_is_zero_in_float32_without_rms():
    bridge = Bridge(D_DENSE, D_SPARSE, K)
    assert bridge.encoder_weight.shape == (7, 5) and bridge.decoder_weight.shape == (5, 7)
    assert all(not p.any() and p.dtype == torch.float32 for p in bridge.parameters())
    assert bridge.rms_dense.isnan() and bridge.rms_sparse.isnan() and len(list(bridge.parameters())) == 4


def test_random_weights_keep_variance_and_follow_the_generator():
    one, two = Bridge(400, 300, 5), Bridge(400, 300, 5)
    one.randomize(torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    two.randomize(torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(one.encoder_weight, two.encoder_weight)
    # 120000 normal entries: the standard deviation's own is 0.2 % of it.
    assert one.encoder_weight.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert one.decoder_weight.std().item() == pytest.approx(300**-0.5, rel=0.02)
    assert not one.encoder_bias.any() and not one.decoder_bias.any()


def test_the_set_is_a_sequence_keyed_by_sparse_sites(bridge_set):
    assert len(bridge_set) == 3 and bridge_set.sites == ["0.attn", "2.attn", "final"]
    assert list(bridge_set) == [bridge_set[i] for i in range(3)]
    assert bridge_set["2.attn"] is bridge_set[1] is bridge_set[-2]
    assert bridge_set.index("final") == bridge_set.index(-1) == 2
    with pytest.raises(KeyError, match=r"site='1.block' has no bridge; the bridged sites are 0.attn, 2.attn, final"):
        bridge_set["1.block"]
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"site={index} is out of range; there are 3"):
            bridge_set[index]
    assert len(list(bridge_set.parameters())) == 12


def same_folders(one, other):
    compared = filecmp.dircmp(one, other)
    names = sorted(os.listdir(one))
    assert compared.left_only == compared.right_only == []
    return filecmp.cmpfiles(one, other, names, shallow=False)[0]


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


UNITS = {"rms_dense": torch.float64, "rms_sparse": torch.float64, "gain_sparse": torch.float32}


@pytest.mark.parametrize("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half, lambda s: s.to("cpu", torch.half)])
def test_half_precision_weights_keep_exact_units(cast, tmp_path):
    bridge_set = BridgeSet([("0.attn", "0.attn")], [filled(dtype=torch.float32)])
    units = {name: normal(7)[: bridge_set[0].get_buffer(name).numel()].to(dtype) for name, dtype in UNITS.items()}
    for name, unit in units.items():
        bridge_set[0].get_buffer(name).copy_(unit.squeeze())
    halved = cast(bridge_set)
    assert halved is bridge_set and halved[0].encoder_weight.dtype.itemsize == 2
    halved.save_pretrained(tmp_path / "a")
    loaded = BridgeSet.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert len(same_folders(tmp_path / "a", tmp_path / "b")) == 4
    for name, unit in units.items():
        for one in (halved, loaded):
            kept = one[0].get_buffer(name)
            assert kept.dtype == unit.dtype and torch.equal(kept, unit.squeeze())


def test_units_follow_the_weights_to_another_device_and_to_float64():
    bridge_set = BridgeSet([("0.attn", "0.attn")], [filled(dtype=torch.bfloat16)])
    assert bridge_set[0].gain_sparse.dtype == torch.float32
    assert bridge_set.double()[0].gain_sparse.dtype == torch.float64
    assert {buffer.device.type for buffer in bridge_set.to("meta").buffers()} == {"meta"}
    assert {buffer.device.type for buffer in bridge_set.to_empty(device="cpu").buffers()} == {"cpu"}


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


def test_check_models_accepts_the_models_of_the_fit_in_any_dtype_and_no_others(tiny, tmp_path):
    dense, sparse = tiny("gpt2"), tiny("llama")
    bridge_set = BridgeSet([("0.attn", "0.attn")], [filled()])
    bridge_set.check_models(dense, sparse)  # nothing remembered, nothing to refuse
    bridge_set.record_models(dense, sparse)
    bridge_set.save_pretrained(tmp_path)
    loaded = BridgeSet.from_pretrained(tmp_path)
    loaded.check_models(tiny("gpt2").to(torch.bfloat16), tiny("llama").double())
    loaded.check_models(dense)
    loaded.check_models(as_residual(dense), as_residual(sparse))
    loaded.record_models(as_residual(dense), as_residual(sparse))
    assert loaded.provenance == bridge_set.provenance
    with pytest.raises(ValueError, match=r"dense=GPT2LMHeadModel is not the model .*'GPT2LMHeadModel'.* hash to bf16:"):
        loaded.check_models(tiny("gpt2", seed=1), sparse)
    with pytest.raises(ValueError, match="sparse=GPT2LMHeadModel is not the model"):
        loaded.check_models(dense, dense)


def test_a_local_models_name_is_its_folders_name(tiny, tmp_path, monkeypatch):
    names = []
    for parent in ("here", "there"):
        folder = tmp_path / parent / "tiny-dense"
        tiny("gpt2").save_pretrained(folder)
        bridge_set = BridgeSet([("0.attn", "0.attn")], [filled()])
        loaded = type(tiny("gpt2")).from_pretrained(folder)
        bridge_set.record_models(loaded, loaded)
        names.append(bridge_set.provenance)
    assert names[0] == names[1] and names[0]["dense"]["name"] == "tiny-dense"
    monkeypatch.chdir(folder)
    loaded.config._name_or_path = "."
    bridge_set.record_models(loaded, loaded)
    assert bridge_set.provenance == names[0]
    hub = tiny("gpt2")
    hub.config._name_or_path = "someone/model"
    bridge_set.record_models(hub, tiny("llama"))
    assert bridge_set.provenance["dense"]["name"] == "someone/model"
    assert bridge_set.provenance["sparse"]["name"] == "LlamaForCausalLM"
