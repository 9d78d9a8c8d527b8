import copy
import filecmp
import os
from contextlib import nullcontext

import pytest
import torch

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


def filled_set():
    """Three bridges with everything that a folder may hold."""
    report = BridgeReport((SiteFigures("0.attn", *[0.125 * i for i in range(10)]),), 2.5, 2.75, 0.375, 99, {"steps": 3})
    pairs = [("0.attn", "0.attn"), ("1.block", "2.attn"), ("final", "final")]
    provenance = {"dense": {"name": "d", "fingerprint": "bf16:1 fp16:2"}, "settings": {"steps": 3}}
    return BridgeSet(pairs, [filled(i) for i in range(3)], provenance, report, [{"step": 1, "train/loss": 0.5}])


@pytest.fixture
def bridge_set():
    return filled_set()


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
