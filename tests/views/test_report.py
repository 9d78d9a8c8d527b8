"""report() on folders of the bundled pair, its data read back."""

import json
import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_cli import run

import bridges
from bridges.channels import one_and_few
from bridges.channels.prompts import frozen_pair
from bridges.channels.search import SearchOptions
from bridges.circuits.circuit import Circuit
from bridges.circuits.many import pruned_tasks
from bridges.demo import demo_circuit, sources
from bridges.fitting.run_file import RunFile
from bridges.io import progress
from bridges.io.amounts import duration
from bridges.io.files import read_json, write_json
from bridges.io.fingerprint import fingerprint
from bridges.views import collect, report
from bridges.views.collect import rounded
from bridges.views.run_folder import OWN_TASK, RunFolder

TASK = "single_double_quote"


@pytest.fixture(autouse=True)
def small(monkeypatch, quick_sweeps):
    """Less text, fewer prompts and strengths."""
    monkeypatch.setattr(one_and_few, "STRENGTHS", (0.0, 1.0))
    monkeypatch.setattr(one_and_few, "SearchOptions", partial(SearchOptions, candidates=8))
    monkeypatch.setattr(collect, "TEXT_TOKENS", 512)
    monkeypatch.setattr(collect, "PAIRS", 8)
    monkeypatch.setattr(report, "PROMPTS", 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder of the bundled pair with its circuit, which names its models."""
    path, pair = tmp_path_factory.mktemp("run"), bridges.load_pair()
    bridge_set = bridges.load_bridges()
    bridge_set.save_pretrained(path)
    RunFile(sources(pair)).save(path)
    demo_circuit(pair).save(path / "circuits" / TASK)
    return path


def data_of(page):
    """The JSON inside a page."""
    inside = re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page.read_text(), re.DOTALL)
    assert inside is not None
    return json.loads(inside[1])


def test_the_page_holds_the_json_that_is_written_beside_it(folder, tmp_path, monkeypatch, capsys):
    status, printed, err = run(monkeypatch, capsys, "report", folder, "--json", "--out", tmp_path / "a.html")
    assert status == 0, err
    assert f"Written to {tmp_path / 'a.html'}" in printed
    data = data_of(tmp_path / "a.html")
    assert data == read_json(tmp_path / "a.data.json")
    assert [task["name"] for task in data["tasks"]] == list(bridges.TASKS) and list(data["circuits"]) == [TASK]
    circuit, shown = demo_circuit(bridges.load_pair()), data["circuits"][TASK]
    nodes = {f"{place}.{i}" for place, indices in circuit.nodes.items() for i in indices}
    assert {node["id"] for node in shown["nodes"]} == nodes == set(data["channels"])
    weights = [edge for edge in shown["edges"] if edge["kind"] == "weight"]
    assert len(weights) == circuit.n_edges == data["tasks"][0]["circuit"]["edges"]
    own = bridges.load_bridges().report
    for site, expected in zip(data["bridges"]["sites"], own.sites, strict=True):
        assert site["nmse_decode"] == rounded(expected.nmse_decode) and site["dense_site"] == expected.name
    sparse = bridges.load_pair().sparse
    assert data["models"]["sparse"]["nonzeros"] == sum(int((p != 0).sum()) for p in sparse.parameters())
    assert data["models"]["sparse"]["layers"] == 2 and data["text"] == "bundled corpus"
    assert data["tasks"][0]["steering"] == {"one": None, "few": None}
    assert f"bridges report {folder} --tasks {TASK}" in data["tasks"][0]["steering_missing"]


@pytest.mark.slow(50)
def test_what_a_task_lacks_is_measured_once_and_left_in_the_folder(folder, tmp_path, monkeypatch):
    quick = partial(pruned_tasks, settings={"steps": 20, "target_loss": 0.5, "n": 8, "text_tokens": 256})
    monkeypatch.setattr(report, "pruned_tasks", quick)
    page = bridges.report(folder, tasks=[TASK, "for_while"], out=tmp_path / "b.html", progress=False)
    data = data_of(page)
    assert len(data["tasks"]) == 20 and list(data["circuits"]) == [TASK, "for_while"]
    tasks = {task["name"]: task for task in data["tasks"]}
    for task in (TASK, "for_while"):
        saved = read_json(folder / "sweeps" / f"{task}.json")
        for which in ("one", "few"):
            assert tasks[task]["steering"][which] == rounded(saved[which]) and saved[which]["prompts"] == 8
        assert data["circuits"][task]["controls"]
    assert data["headline"] == TASK  # whose channel turns both models
    monkeypatch.setattr(report, "pruned_tasks", None)  # a second search would fail
    monkeypatch.setattr(report, "sweep_one_and_few", None)
    assert data_of(bridges.report(folder, tasks=[TASK, "for_while"], progress=False)) == data


def test_the_time_left_follows_from_the_tasks_measured_so_far(monkeypatch):
    notes, clock = [], iter([100.0, 130.0, 220.0, 250.0])
    monkeypatch.setattr(report, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress.Bar, "advance", lambda self, steps=1, note=None: notes.append(note))
    assert list(report._timed(["a", "b", "c"], "report: sweeps", progress=False)) == ["a", "b", "c"]
    # 30 seconds for one of three; then two minutes for two of three.
    assert notes == [f"about {duration(60)} left", f"about {duration(60)} left", ""]


def test_what_is_refused_is_refused_before_anything_is_measured(folder, tmp_path):
    with pytest.raises(ValueError, match=r"run_dir='.*' holds no bridges; give a folder of `bridges fit`"):
        bridges.report(tmp_path)
    with pytest.raises(ValueError, match="tasks='nonsense' must be all, or some of single_double_quote"):
        bridges.report(folder, tasks=["for_while", "nonsense"])
    bridges.load_bridges().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="pass --dense and --sparse"):
        bridges.report(tmp_path / "bare")
    for out in (tmp_path, tmp_path / "report.json"):
        with pytest.raises(ValueError, match=r"out='.*' must be a file for HTML"):
            bridges.report(folder, out=out)
    pair = bridges.load_pair()
    models = {"dense": pair.dense, "sparse": bridges.SparseTransformer(pair.sparse.config)}
    with pytest.raises(ValueError, match=r"fingerprint|other model|fitted"):
        bridges.report(folder, **models)


def test_the_tokenizer_is_found_beside_the_models_that_are_given(tmp_path, monkeypatch):
    bridges.load_bridges().save_pretrained(tmp_path)
    pair = bridges.load_pair()
    pair.tokenizer.save_pretrained(tmp_path / "tokens")
    pair.sparse.save_pretrained(tmp_path / "tokens")
    monkeypatch.setattr(report, "write_page", lambda data, path: seen.append(data))
    monkeypatch.setattr(report, "log_page", lambda folder, path: None)
    seen = []
    bridges.report(tmp_path, dense=pair.dense, sparse=tmp_path / "tokens", progress=False)
    assert len(seen[0]["tasks"]) == 20


SWEEP = {"task": TASK, "site": "0.mlp", "strengths": [0.0, 1.0], "channel": 753}


def test_results_of_a_folder_are_found_wherever_commands_put_them(tmp_path):
    bridge_set = bridges.load_bridges()
    bridge_set.save_pretrained(tmp_path / "bridges")
    found = RunFolder(tmp_path)
    assert found.bridges == tmp_path / "bridges" and found.report(bridge_set).sites
    few, loops = SWEEP | {"channel": [1, 2]}, SWEEP | {"task": "for_while"}
    write_json(tmp_path / "steering.json", {**SWEEP, "few_channels": few})
    write_json(tmp_path / "steering" / "for_while.json", loops | {"channel": [3, 4]})
    assert found.steering(bridge_set) == {
        TASK: {"one": SWEEP, "few": few},
        "for_while": {"one": None, "few": loops | {"channel": [3, 4]}},
    }
    # A search for few that ends with one is still that of the few.
    write_json(tmp_path / "steering.json", {**SWEEP, "few_channels": SWEEP | {"site": "1.attn"}})
    assert found.steering(bridge_set)[TASK] == {"one": SWEEP, "few": SWEEP | {"site": "1.attn"}}


def test_sweeps_of_other_bridges_are_not_shown_and_those_of_the_user_come_first(tmp_path):
    bridge_set = bridges.load_bridges()
    bridge_set.save_pretrained(tmp_path)
    found, loops = RunFolder(tmp_path), SWEEP | {"task": "for_while"}
    found.save_sweeps("for_while", {"one": loops, "few": None}, bridge_set)
    found.save_sweeps("var_if", {"missing": "no channel turns both"}, bridge_set)
    assert found.steering(bridge_set) == {"for_while": {"one": loops, "few": None}}
    assert found.unsteered(bridge_set) == {"var_if": "no channel turns both"}
    write_json(tmp_path / "steering" / "for_while.json", loops | {"channel": 9})
    assert found.steering(bridge_set)["for_while"]["one"]["channel"] == 9
    (tmp_path / "steering" / "for_while.json").unlink()
    with torch.no_grad():
        bridge_set[0].encoder_bias[0] += 1
    assert found.steering(bridge_set) == found.unsteered(bridge_set) == {}


def test_files_that_are_damaged_or_of_another_model_are_named(folder, tmp_path):
    pair, bridge_set = bridges.load_pair(), bridges.load_bridges()
    bridge_set.save_pretrained(tmp_path)
    found = RunFolder(tmp_path)
    write_json(tmp_path / "steering" / "mine.json", {"a": 1})
    with pytest.raises(ValueError, match=r"steering/mine\.json is no result of `bridges steer`"):
        found.steering(bridge_set)
    other = Circuit("mine", {}, [], {}, fingerprint="bf16:1 fp16:2")
    other.save(tmp_path / "circuits" / "mine")
    write_json(tmp_path / "circuits" / "summary.json", {"for_while": {"message": "x", "fingerprint": "bf16:1 fp16:2"}})
    with frozen_pair(pair.dense, pair.sparse, bridge_set, check_models=False) as models:
        with pytest.raises(ValueError, match=r"circuits/mine holds a circuit of another model"):
            found.circuits(models)
        assert found.unreached(models) == {}
        (tmp_path / "steering" / "mine.json").unlink()
        replace(other, fingerprint=fingerprint(pair.sparse)).save(tmp_path / "circuits" / "mine")
        assert found.left_out(models) == {"mine": OWN_TASK}
    report_of = bridge_set.report.to_dict()
    report_of["sites"][0]["name"] = "7.attn"
    write_json(tmp_path / "report.json", report_of)
    with pytest.raises(ValueError, match=r"report\.json has the site '7\.attn', at which there is no bridge"):
        found.report(bridge_set)


def test_prompts_that_a_circuit_was_searched_on_are_not_on_the_page():
    tokenizer = bridges.load_pair().tokenizer
    circuit = Circuit("var_swap", {}, [], {}, settings={"n": 64, "seed": collect.PAIRS_SEED})
    searched = set(collect._prompts(bridges.task_pairs("var_swap", tokenizer, 64, collect.PAIRS_SEED)))
    shown = collect._prompts(collect.page_pairs("var_swap", tokenizer, circuit))
    assert shown and not searched & set(shown)
    assert searched & set(collect._prompts(collect.page_pairs("var_swap", tokenizer)))


def test_numbers_are_rounded_to_significant_digits_and_keep_their_kinds():
    assert rounded({"a": (1.23456789e-8, True, 7, "x", None), "b": math.inf}) == {
        "a": [1.234568e-8, True, 7, "x", None],
        "b": None,
    }
