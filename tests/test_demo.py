"""The whole demo at tiny settings, its files read back."""

import json
from functools import partial

import pytest
from views.test_report import data_of

import bridges
from bridges import demo as module
from bridges.circuits.controls import necessity
from bridges.circuits.pruning import prune
from bridges.demo import SETTINGS, demo
from bridges.views import collect
from bridges.views.collect import rounded

INTERFACE = {
    "p_target",
    "p_target_random_direction",
    "p_target_mean_difference",
    "p_target_all_channels",
    "p_target_sparse_model",
}


SIZES = {"TRAIN_DOCUMENTS": 200, "HELDOUT_DOCUMENTS": 40, "SEARCH_DOCUMENTS": 20, "TEXT_ROWS": 8, "MAX_CHANNELS": 3}
SIZES |= {"EVAL_TOKENS": 2048, "KL_TOKENS": 1024, "FEATURE_TOKENS": 1024}


@pytest.fixture
def tiny(monkeypatch, quick_sweeps):
    """The demo with less text and fewer prompts, sets of at most three channels, and a quick search for a circuit."""
    for name, size in SIZES.items():
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(collect, "PAIRS", 8)
    monkeypatch.setattr(module, "CIRCUIT_LOSS", 0.15)
    monkeypatch.setattr(module, "prune", partial(prune, n=64, steps=20, text_tokens=2048))


@pytest.mark.slow(60)
def test_fitted_anew_it_writes_what_the_interface_lists(tmp_path, tiny):
    settings = {"steps": 3, "closed_form_tokens": 12_000, "eval_tokens": 1024}
    demo(tmp_path, SETTINGS.with_settings(settings), prompts=12, progress=False)
    check_files(tmp_path, n_prompts=12)


@pytest.mark.slow(50)
def test_with_the_bundled_bridges_it_writes_the_same(tmp_path, tiny):
    demo(tmp_path, prompts=12, progress=False)
    check_files(tmp_path, n_prompts=12)


def test_the_bundled_bridges_are_what_their_report_says():
    """Fitted by the demo's settings; measured anew on a part of what the report is of, they are as good."""
    pair, bridge_set = bridges.load_pair(), bridges.load_bridges()
    assert bridge_set.report is not None
    fitted = bridge_set.provenance["fit"]
    assert {name: fitted[name] for name in ("steps", "lr", "nmse_weight")} == {
        name: getattr(SETTINGS, name) for name in ("steps", "lr", "nmse_weight")
    }
    rows = module.demo_rows(pair, "heldout", 40, 128, 0)[:12]
    measured = bridges.evaluate(pair.dense, pair.sparse, bridge_set, rows, progress=False)
    for name in ("nmse_encode", "nmse_decode", "kl_dense_to_sparse", "kl_sparse_to_dense"):
        assert measured.mean[name] == pytest.approx(bridge_set.report.mean[name], rel=0.25), name


def test_the_bundled_circuit_is_what_it_says():
    """Of the bundled model; its figures can be computed again; it is right on new pairs and nothing is without it."""
    pair, circuit = bridges.load_pair(), module.demo_circuit(bridges.load_pair())
    circuit.check_model(pair.sparse)
    assert circuit.n_nodes <= 15 and circuit.n_edges <= 12
    assert circuit.nodes["0.mlp.read"] and circuit.nodes["1.attn.v"] and circuit.nodes["1.mlp.neuron"]
    pairs = bridges.task_pairs(module.TASK, pair.tokenizer, 64, seed=7)
    fresh = circuit.evaluate(pair.sparse, pairs)
    assert fresh.accuracy == 1 and fresh.loss < 0.05
    without = necessity(pair.sparse, circuit, pairs)
    assert without["accuracy"] < 0.6 and without["loss"] > 0.6
    for name in ("shuffled_labels", "meaningless_cue", "permuted_weights", "forbidden"):
        assert circuit.controls[name]["nodes"] is None, name
    twin = circuit.controls["dense_twin"]
    assert twin["masks"]["edges"] > 16 * circuit.n_edges and abs(twin["text_ce"] - twin["text_ce_own"]) < 0.1


def check_files(folder, n_prompts):
    """Every file is there, and says the same as the others."""
    report = json.loads((folder / "report.json").read_text())
    assert [site["name"] for site in report["sites"]] == ["0.attn", "0.mlp", "1.attn", "1.mlp", "final"]
    assert report["mean"]["nmse_decode"] < 0.5 < report["mean"]["nmse_decode_shuffled"]
    assert report["mean"]["kl_sparse_to_dense"] < report["mean"]["kl_sparse_to_dense_mean_ablation"] / 5
    steering = json.loads((folder / "steering.json").read_text())
    assert steering["prompts"] == n_prompts
    for name in INTERFACE:
        assert len(steering[name]) == len(steering["strengths"]) == 11
    assert steering["p_target"][0] < 0.05
    assert steering["p_target"][-1] > 2 * steering["p_target_random_direction"][-1]
    assert sum(steering["p_target_by_direction"]) / 2 == pytest.approx(steering["p_target"][-1])
    few = steering["few_channels"]
    assert -1 <= steering["ranking_agreement"] == few["ranking_agreement"] <= 1
    channels = few["channel"] if isinstance(few["channel"], list) else [few["channel"]]  # a number where it is one
    assert 1 <= len(channels) <= 3 and few["p_target_sparse_model"][-1] > few["p_target_sparse_model"][0]
    assert steering["side_effects"]["tokens"] > 0 and steering["side_effects"]["kl_other_tasks"] > 0
    assert bridges.BridgeSet.from_pretrained(folder / "bridges").report.to_dict() == report
    circuit = bridges.Circuit.load(folder / "circuit")
    features = json.loads((folder / "features.json").read_text())
    assert circuit.task == module.TASK and len(features) == circuit.n_nodes
    assert all(one["dense"] is not None for one in features if ".read." in one["node"])
    data = data_of(folder / "index.html")
    assert data["headline"] == module.TASK and len(data["tasks"]) == 20 and list(data["circuits"]) == [module.TASK]
    assert data["tasks"][0]["steering"]["one"]["p_target"] == rounded(steering["p_target"])
    assert data["bridges"]["mean"] == rounded(report["mean"])
    nodes = {node["id"] for node in data["circuits"][module.TASK]["nodes"]}
    steered = {f"{few['site']}.read.{channel}" for channel in channels}
    assert nodes | steered | {f"{steering['site']}.read.{steering['channel']}"} == set(data["channels"])
    for picture in ("quality.png", "steering.png"):
        assert (folder / picture).stat().st_size > 10_000
    again = data_of(bridges.report(folder, out=folder / "again.html", progress=False))
    shown = ("title", "headline", "text", "bridges", "circuits", "channels")
    assert {name: again[name] for name in shown} == {name: data[name] for name in shown}
