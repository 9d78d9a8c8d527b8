"""The table of readability: its figures against whole passes on a tiny random pair in float64, its sums by hand."""

import json
import math

import bench_readability as bench
import pytest
import torch
from pairs import kl_of_turning_off, tokens, toy_task
from whole import whole_run, written_p_target

import bridges
from bridges.channels.agreement import changed_channels, intervention_agreement
from bridges.channels.prompts import Channels
from bridges.channels.runs import Prompts
from bridges.channels.search import SearchOptions
from bridges.objective.pair import SIDES

TASK = toy_task(rows=72)
"""64 pairs to choose on, and eight to report."""
TEXT = tokens(3, 9)
EVERY_CHANNEL = 12


def with_search(**options):
    search = SearchOptions(bench.MOST, "both", **{"budget": math.inf, "candidates": EVERY_CHANNEL, **options})
    return bench.Options(search, tokens(4, 9), TEXT)


@pytest.fixture(scope="module")
def record(pair):
    with torch.no_grad():
        return bench.measured(pair, TASK, with_search())


@pytest.fixture(scope="module")
def reported(pair):
    return whole_run(pair, TASK.rows(64))


@pytest.mark.slow
def test_a_sets_figures_are_those_of_its_edit_on_the_pairs_that_it_was_not_chosen_on(pair, record, reported):
    for name, most in (("one", 1), ("four", 4)):
        one = record[name]
        chosen = Channels(one["site"], tuple(one["channels"]), one["at"])
        assert len(chosen.channels) <= most
        p = {side: written_p_target(pair, reported, chosen, side=side) for side in SIDES}
        ways = {side: [p[side][direction::2].mean().item() for direction in (0, 1)] for side in SIDES}
        assert one["p_dense"] == pytest.approx(p["dense"].mean().item(), rel=1e-9)
        assert one["p_sparse"] == pytest.approx(p["sparse"].mean().item(), rel=1e-9)
        assert one["by_direction"]["sparse"] == pytest.approx(ways["sparse"], rel=1e-9)
        assert one["worst"] == pytest.approx(min(ways["dense"] + ways["sparse"]), rel=1e-9)
        assert one["ablation_kl"] == pytest.approx(kl_of_turning_off(pair, TEXT, chosen), rel=1e-9)
        agreement = intervention_agreement(pair, Prompts(pair, TASK.rows(64)), chosen)
        assert one["r_squared"] == agreement.r_squared and one["r_squared_shuffled"] == agreement.r_squared_shuffled
        assert 0 < one["p_random"] < 1


@pytest.mark.slow
def test_the_channel_for_the_sparse_model_alone_is_the_best_of_all_on_the_pairs_to_choose_on(pair, record, reported):
    run = whole_run(pair, TASK.rows(0, 64))
    every = [
        Channels(site, (c,), at) for site in pair.bridge_set.sites for at in ("read", "residual") for c in range(12)
    ]
    best = max(every, key=lambda one: written_p_target(pair, run, one, side="sparse").mean().item())
    alone = record["sparse_alone"]
    assert Channels(alone["site"], tuple(alone["channels"]), alone["at"]) == best
    assert alone["p_sparse"] == pytest.approx(written_p_target(pair, reported, best, side="sparse").mean().item())


@pytest.mark.slow
def test_changed_channels_are_counted_as_agreement_counts_them_and_for_each_pair(pair, record, reported):
    prompts = Prompts(pair, TASK.rows(64))
    for i, site in enumerate(pair.bridge_set.sites):
        assert record["changed"][site] == changed_channels(pair, prompts, Channels(site, (0,), "read")).sum()
        of_pairs = sorted(sum(bool(dz[:, c].any()) for c in range(12)) for dz in reported.dz[i])
        assert record["changed_per_pair"][site] == (of_pairs[3] + of_pairs[4]) / 2


def test_a_task_without_channels_is_zeros_with_the_reason(pair):
    task = TASK.replaced(counterfactual_ids=TASK.input_ids)
    with torch.no_grad():
        record = bench.measured(pair, task, with_search(candidates=8))
    for name in ("one", "four"):
        assert record[name]["p_sparse"] == record[name]["worst"] == 0 and not record[name]["channels"]
        assert "none of the" in record[name]["reason"]
    assert set(record["changed"].values()) == {0}
    zeros = " 0.00, 0.00 (none) | 0.00 | 0.00 | 0.000 | 0.00 (0.00) |"
    assert bench.row("toy", record | {"cpu_seconds": 1.0}).count(zeros) == 2


def made_up(p_sparse, p_dense, worst, alone=0.0, changed=5):
    one = {"channels": [1], "site": "0.mlp", "at": "read", "p_sparse": p_sparse, "p_dense": p_dense, "worst": worst}
    # Of the tasks that turn both, and of those that are solved, other figures than of all.
    one |= {"p_random": 0.2 if p_dense == 0.8 else 0.1, "ablation_kl": 0.03 if p_dense == 0.8 else 0.02}
    one |= {"r_squared": 0.4 if p_dense == 0.4 else 0.5, "r_squared_shuffled": None}
    return {
        "solved": {"dense": 1.0, "sparse": p_sparse},
        "sparse_alone": {"p_sparse": alone},
        "one": one,
        "four": {**one, "p_dense": 0.9},
        "changed": {"0.attn": changed},
        "changed_per_pair": {"0.attn": changed / 2},
        "seconds": 3.0,
        "cpu_seconds": 2.0,
    }


def test_the_summary_counts_turned_tasks_and_takes_means_and_medians():
    records = {
        "a": made_up(0.9, 0.8, 0.4, alone=0.95, changed=3),
        "b": made_up(0.9, 0.8, 0.2, alone=0.6, changed=9),
        "c": made_up(0.9, 0.4, 0.35),
        "d": made_up(0.1, 0.9, 0.0),
    }
    found = bench.summary(records)
    assert (found["solved_dense"], found["solved_sparse"]) == (4, 3)
    assert found["sparse_alone"] == {"turned": 2, "p_sparse": pytest.approx(1.55 / 4)}
    assert found["one"]["turned_sparse"] == 3 and found["one"]["turned_both"] == 2
    assert found["one"]["turned_both_either_way"] == 1 and found["four"]["turned_both_either_way"] == 2
    assert found["one"]["p_dense"] == pytest.approx(2.9 / 4) and found["four"]["p_dense"] == pytest.approx(0.9)
    assert found["one"]["over_solved"] == {"r_squared": pytest.approx(1.4 / 3), "r_squared_shuffled": 0.0}
    assert found["one"]["over_turned"] == {"p_random": pytest.approx(0.2), "ablation_kl": pytest.approx(0.03)}
    assert found["changed"] == {"0.attn": 5} and found["changed_per_pair"] == {"0.attn": 2.5}
    told = "\n".join(bench.lines(found, {"nmse_decode": 0.25}))
    assert "nmse_decode 0.250" in told and "in both on 2, in both and each way round over 0.3 on 1" in told


@pytest.mark.slow(30)
def test_the_bundled_pair_is_measured_task_by_task_and_a_second_call_goes_on(tmp_path, capsys, monkeypatch):
    for name, size in (("TRAIN_DOCUMENTS", 40), ("HELDOUT_DOCUMENTS", 4), ("CHOSEN_ON", 16), ("RANDOM_DIRECTIONS", 2)):
        monkeypatch.setattr(bench, name, size)
    out = tmp_path / "readability.json"
    arguments = ["--prompts", "8", "--rows", "2", "--candidates", "8", "--budget", "inf", "--out", str(out)]
    arguments += ["--closed-form-tokens", "1000"]
    first = bench.main([*arguments, "--tasks", "single_double_quote"])
    both = bench.main([*arguments, "--tasks", "single_double_quote", "for_while"])
    assert both["tasks"]["single_double_quote"] == first["tasks"]["single_double_quote"]
    assert list(both["tasks"]) == ["single_double_quote", "for_while"] and both["summary"]["tasks"] == 2
    assert both["report"]["nmse_decode"] > 0 and first["report"] == both["report"]
    printed = capsys.readouterr().out
    assert printed.count("| single_double_quote | 100%") == 2
    monkeypatch.setattr(bridges, "fit", None)  # nothing is missing, so nothing is fitted
    assert bench.main([*arguments, "--tasks", "for_while"]) == json.loads(out.read_text())
    with pytest.raises(ValueError, match="was written with another prompts; pass another file"):
        bench.main([*arguments, "--prompts", "4"])


def test_a_second_call_measures_the_tasks_that_are_missing_with_the_bridges_of_the_first(tmp_path, monkeypatch):
    fits, asked = [], []

    def bridged(dense, sparse, train, heldout, tokens):
        fits.append(tokens)
        settings = {"eval_data": heldout[:4, :32], "steps": 0, "sites": ("0.mlp",), "ridge": 0.1, "progress": False}
        return bridges.fit(dense, sparse, train[:64, :32], **settings)

    def measured(models, pairs, options):
        asked.append((pairs.task, len(pairs), models.bridge_set["0.mlp"].decoder_weight.double().sum().item()))
        return made_up(0.9, 0.8, 0.4)

    monkeypatch.setattr(bench, "bridged", bridged)
    monkeypatch.setattr(bench, "measured", measured)
    monkeypatch.setattr(bench, "TRAIN_DOCUMENTS", 40)
    arguments = ["--prompts", "4", "--closed-form-tokens", "500", "--out", str(tmp_path / "a.json")]
    bench.main([*arguments, "--tasks", "for_while"])
    content = bench.main([*arguments, "--tasks", "for_while", "with_as"])
    assert fits == [500] and [one[:2] for one in asked] == [("for_while", 68), ("with_as", 68)]
    assert asked[0][2] == asked[1][2]
    assert content == json.loads((tmp_path / "a.json").read_text()) and content["summary"]["tasks"] == 2
    with pytest.raises(ValueError, match="was written with another prompts; pass another file"):
        bench.main([*arguments, "--prompts", "5"])
