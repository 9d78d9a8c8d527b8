"""report() on folders of the bundled pair, its data read back."""

import json
import math
import re
from functools import partial

import pytest
from test_cli import run

import bridges
from bridges.circuits.many import pruned_tasks
from bridges.demo import demo_circuit, sources
from bridges.fitting.run_file import RunFile
from bridges.io.files import read_json, write_json
from bridges.views import collect, report
from bridges.views.collect import rounded
from bridges.views.run_folder import RunFolder

TASK = "single_double_quote"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Less text and fewer prompts."""
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
    assert data == read_json(tmp_path / "a.json")
    assert [task["name"] for task in data["tasks"]] == list(data["circuits"]) == [TASK]
    circuit, shown = demo_circuit(bridges.load_pair()), data["circuits"][TASK]
    nodes = {f"{place}.{i}" for place, indices in circuit.nodes.items() for i in indices}
    assert {node["id"] for node in shown["nodes"]} == nodes == set(data["channels"])
    assert (
        sum(edge["kind"] == "weight" for edge in shown["edges"])
        == circuit.n_edges
        == data["tasks"][0]["circuit"]["edges"]
    )
    own = bridges.load_bridges().report
    for site, expected in zip(data["bridges"]["sites"], own.sites, strict=True):
        assert site["nmse_decode"] == rounded(expected.nmse_decode) and site["dense_site"] == expected.name
    # Two in every row, but for the attention's output, whose 2,048 rows hold 1,024.
    rows = 2 * 1024 + 2 * (1536 + 3 * 2048)
    assert data["models"]["sparse"]["nonzeros_per_row"] == rounded((2 * rows - 2 * 3 * 1024) / rows)
    assert data["tasks"][0]["steering"] == {"one": None, "few": None}
    assert f"bridges report {folder} --tasks {TASK}" in data["tasks"][0]["steering_missing"]


@pytest.mark.slow
def test_what_a_task_lacks_is_measured_once_and_left_in_the_folder(folder, tmp_path, monkeypatch):
    quick = partial(pruned_tasks, settings={"steps": 20, "target_loss": 0.5, "n": 8, "text_tokens": 256})
    monkeypatch.setattr(report, "pruned_tasks", quick)
    page = bridges.report(folder, tasks=[TASK, "for_while"], out=tmp_path / "b.html", progress=False)
    data = data_of(page)
    assert [task["name"] for task in data["tasks"]] == [TASK, "for_while"] == list(data["circuits"])
    for task in data["tasks"]:
        for which in ("one", "few"):
            saved = read_json(folder / "sweeps" / f"{task['name']}.json")[which]
            assert task["steering"][which] == rounded(saved) and saved["prompts"] == 8
    assert data["headline"] == TASK  # whose channel turns both models
    monkeypatch.setattr(report, "pruned_tasks", None)  # a second search would fail
    monkeypatch.setattr(report, "find_sizes", None)
    assert data_of(bridges.report(folder, tasks=[TASK, "for_while"], progress=False)) == data


def test_folders_without_bridges_tasks_that_are_unknown_and_models_that_are_not_named_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"run_dir='.*' holds no bridges; give a folder of `bridges fit`"):
        bridges.report(tmp_path)
    with pytest.raises(ValueError, match="tasks='nonsense' must be all, or some of single_double_quote"):
        bridges.report(folder, tasks=["for_while", "nonsense"])
    bridges.load_bridges().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="pass --dense and --sparse"):
        bridges.report(tmp_path / "bare")


def test_results_of_a_folder_are_found_wherever_commands_put_them(tmp_path):
    bridges.load_bridges().save_pretrained(tmp_path / "bridges")
    found = RunFolder(tmp_path)
    assert found.bridges == tmp_path / "bridges" and found.tasks() == [] and found.report().sites
    quotes, few = {"task": TASK, "channel": 753}, {"task": TASK, "channel": [1, 2]}
    write_json(tmp_path / "steering.json", {**quotes, "few_channels": few})
    write_json(tmp_path / "steering" / "for_while.json", {"task": "for_while", "channel": [3, 4]})
    assert found.steering() == {
        TASK: {"one": quotes, "few": few},
        "for_while": {"one": None, "few": {"task": "for_while", "channel": [3, 4]}},
    }
    found.save_sweeps("for_while", {"one": {"task": "for_while", "channel": 5}, "few": None})
    assert found.steering()["for_while"] == {"one": {"task": "for_while", "channel": 5}, "few": None}
    assert found.tasks() == [TASK, "for_while"]
    write_json(tmp_path / "circuits" / "summary.json", {"for_while": {"nodes": None, "message": "not under 0.15"}})
    assert found.unreached() == {"for_while": "not under 0.15"}


def test_numbers_are_rounded_to_significant_digits_and_keep_their_kinds():
    assert rounded({"a": (1.23456789e-8, True, 7, "x", None), "b": math.inf}) == {
        "a": [1.2346e-8, True, 7, "x", None],
        "b": None,
    }
