"""The table over tasks, and what a second call keeps of it, on the planted model."""

import json

import pytest
from planted import planted_model, planted_pairs, planted_text

from bridges.circuits import many
from bridges.circuits.circuit import Circuit
from bridges.circuits.controls import controls
from bridges.circuits.many import prune_tasks
from bridges.circuits.pruning import prune
from bridges.circuits.search import TargetNotReached
from bridges.circuits.summary import failed_row, found_row, in_few_words, print_table, with_means
from bridges.io.fingerprint import fingerprint

FRESH = planted_pairs(64, seed=3)
TASKS = ("planted", "nonsense")
SETTINGS = {"steps": 60}


@pytest.fixture(scope="module")
def model():
    return planted_model()


@pytest.fixture
def searched(monkeypatch):
    """Prunes planted pairs under two names; answers to the second have nothing to do with the cue. Lists the calls."""
    calls = []

    def planted_prune(model, task, *, tokenizer, progress, **settings):
        calls.append((task, settings))
        pairs = planted_pairs(shuffled=task == "nonsense").replaced(task=task)
        return prune(model, pairs, text=planted_text(), progress=False, **settings)

    def planted_controls(model, circuit, *, tokenizer, dense_twin, progress):
        return controls(model, circuit, FRESH, text=planted_text(), progress=False)

    monkeypatch.setattr(many, "prune", planted_prune)
    monkeypatch.setattr(many, "controls", planted_controls)
    return calls


def cells_of(task, printed):
    """The cells of a task's row in the table."""
    line = next(line for line in printed.splitlines() if line.startswith(f"│ {task} "))
    return [one.strip() for one in line.split("│")][1:-1]


def call(model, out, tasks=TASKS, with_controls=False, **settings):
    return prune_tasks(model, tasks, out, None, with_controls, {**SETTINGS, **settings}, False)


def test_the_table_and_the_summary_hold_sizes_losses_and_controls_of_every_task(model, tmp_path, searched, capsys):
    found = call(model, tmp_path, with_controls=True)
    assert list(found) == ["planted"]
    circuit, summary = found["planted"], json.loads((tmp_path / "summary.json").read_text())
    row = summary["planted"]
    assert (row["nodes"], row["edges"]) == (4, circuit.n_edges)
    assert row["loss"] == circuit.loss and row["scale"] == circuit.scale
    assert row["loss_heldout_unscaled"] == pytest.approx(circuit.evaluate(model, FRESH).loss_unscaled)
    assert row["necessity"] == circuit.controls["necessity"]["loss"]
    for name in ("shuffled_labels", "permuted_weights"):
        assert row[name] == json.loads(json.dumps(circuit.controls[name]))
    assert row["verdict"] == in_few_words(circuit.controls["verdict"]) and row["verdict"]
    assert summary["nonsense"]["nodes"] is None and summary["nonsense"]["loss"] > 0.5
    assert summary["geometric_mean"] == {"tasks": 1, "nodes": 4, "edges": circuit.n_edges}

    lines = capsys.readouterr().out.splitlines()
    cells = cells_of("planted", "\n".join(lines))
    shuffled = circuit.controls["shuffled_labels"]["loss"]
    assert cells[:4] == ["planted", "4", str(circuit.n_edges), f"{circuit.loss:.3f}"]
    assert cells[4] == f"{row['loss_heldout_unscaled']:.3f}" and cells[7] == f"none ({shuffled:.2f})"
    assert any("nonsense" in line and "target not reached" in line for line in lines)
    assert any("geometric mean of 1" in line and "4.0" in line for line in lines)


def test_a_second_call_keeps_all_rows_and_searches_a_failed_task_again_with_other_settings_only(
    model, tmp_path, searched, capsys
):
    call(model, tmp_path)
    summary, printed = (tmp_path / "summary.json").read_bytes(), capsys.readouterr().out
    call(model, tmp_path)
    assert (tmp_path / "summary.json").read_bytes() == summary and capsys.readouterr().out == printed
    assert [task for task, _ in searched] == ["planted", "nonsense"]
    call(model, tmp_path, ("planted",), steps=30)  # a row of a task that is not asked for stays
    assert (tmp_path / "summary.json").read_bytes() == summary
    with pytest.raises(TargetNotReached, match="does not come under"):
        call(model, tmp_path, ("nonsense",))
    assert len(searched) == 2
    call(model, tmp_path, steps=30)
    assert searched[2:] == [("nonsense", {"steps": 30})]
    assert json.loads((tmp_path / "summary.json").read_text())["nonsense"]["settings"]["steps"] == 30


def test_rows_of_another_model_and_of_a_folder_that_is_gone_are_dropped(model, tmp_path, searched):
    gone = found_row(Circuit("gone", {"final.read": (1,)}, [], {}, fingerprint=fingerprint(model)))
    other = failed_row(TargetNotReached("no", 0.6), {}, "bf16:0 fp16:0")
    (tmp_path / "summary.json").write_text(json.dumps(with_means({"gone": gone, "other": other})))
    call(model, tmp_path)
    assert list(json.loads((tmp_path / "summary.json").read_text())) == [*TASKS, "geometric_mean"]


def test_a_circuit_without_controls_has_dashes_and_nothing_found_has_no_mean(capsys):
    rows = {"a": found_row(Circuit("a", {"final.read": (1, 2)}, [], {}, loss=0.125))}
    print_table(with_means(rows))
    assert cells_of("a", capsys.readouterr().out) == ["a", "2", "0", "0.125", "-", "1", "-", "-", "-", ""]
    assert with_means({})["geometric_mean"] == {"tasks": 0, "nodes": None, "edges": None}
    assert with_means(rows)["geometric_mean"] == {"tasks": 1, "nodes": 2, "edges": 0}
