"""The whole demo at tiny settings, its files read back."""

import json

import pytest

import bridges
from bridges import demo as module
from bridges.demo import SETTINGS, demo

INTERFACE = {
    "p_target",
    "p_target_random_direction",
    "p_target_mean_difference",
    "p_target_all_channels",
    "p_target_sparse_model",
}


@pytest.mark.slow
def test_the_demo_writes_what_the_interface_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TRAIN_DOCUMENTS", 200)
    monkeypatch.setattr(module, "HELDOUT_DOCUMENTS", 40)
    monkeypatch.setattr(module, "MAX_CHANNELS", 3)
    settings = {"steps": 5, "closed_form_tokens": 20_000, "eval_tokens": 2048, "progress": False}
    demo(tmp_path, SETTINGS.with_settings(settings), prompts=20)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [site["name"] for site in report["sites"]] == ["0.attn", "0.mlp", "1.attn", "1.mlp", "final"]
    assert report["mean"]["nmse_decode"] < 0.5 < report["mean"]["nmse_decode_shuffled"]
    assert report["mean"]["kl_sparse_to_dense"] < report["mean"]["kl_sparse_to_dense_mean_ablation"] / 5
    steering = json.loads((tmp_path / "steering.json").read_text())
    assert steering["prompts"] == 20
    for name in INTERFACE:
        assert len(steering[name]) == len(steering["strengths"]) == 11
    assert steering["p_target"][0] < 0.05
    assert steering["p_target"][-1] > 2 * steering["p_target_random_direction"][-1]
    assert sum(steering["p_target_by_direction"]) / 2 == pytest.approx(steering["p_target"][-1])
    few = steering["few_channels"]
    assert -1 <= steering["ranking_agreement"] == few["ranking_agreement"] <= 1
    assert 1 <= len(few["channel"]) <= 3 and few["p_target_sparse_model"][-1] > few["p_target_sparse_model"][0]
    assert steering["side_effects"]["tokens"] > 0 and steering["side_effects"]["kl_other_tasks"] > 0
    assert bridges.BridgeSet.from_pretrained(tmp_path / "bridges").report.to_dict() == report
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert f"Channel {steering['channel']}" in page
    for picture in ("quality.png", "steering.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
