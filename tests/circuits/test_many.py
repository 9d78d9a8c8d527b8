import json
from functools import partial

import pytest
from pairs import sparse_model
from test_cli import run

import bridges
from bridges import cli
from bridges.circuits import many
from bridges.circuits.circuit import Circuit
from bridges.circuits.many import prune_tasks
from bridges.io.fingerprint import fingerprint

SETTINGS = {"steps": 3, "target_loss": 0.5, "n": 6, "text_tokens": 256}
TASKS = ("single_double_quote", "for_while")


@pytest.fixture(scope="module")
def pair():
    return bridges.load_pair()


def test_circuits_of_several_tasks_are_saved_and_not_searched_twice(pair, tmp_path, capsys, monkeypatch):
    arguments = (pair.sparse, TASKS, tmp_path, pair.tokenizer, False, SETTINGS, False)
    found = prune_tasks(*arguments)
    assert list(found) == list(TASKS)
    for task in TASKS:
        assert Circuit.load(tmp_path / task).nodes == found[task].nodes
    summary = json.loads((tmp_path / "summary.json").read_text())
    row = summary["for_while"]
    assert (row["nodes"], row["edges"]) == (found["for_while"].n_nodes, found["for_while"].n_edges)
    assert row["loss"] == found["for_while"].loss and row["necessity"] is None
    printed = capsys.readouterr().out
    monkeypatch.setattr(many, "prune", None)  # a second search would fail
    assert list(prune_tasks(*arguments)) == list(TASKS)
    assert capsys.readouterr().out == printed


def test_a_task_that_does_not_reach_the_target_is_told_and_the_others_go_on(pair, tmp_path, capsys):
    settings, tasks = {**SETTINGS, "target_loss": 1e-12, "steps": 1}, ["var_swap", "for_while"]
    assert prune_tasks(pair.sparse, tasks, tmp_path, pair.tokenizer, False, settings, False) == {}
    assert capsys.readouterr().out.count("does not come under target_loss=1e-12") == 2
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["for_while"]["nodes"] is None and summary["for_while"]["loss"] > 1e-12
    with pytest.raises(ValueError, match="does not come under"):
        prune_tasks(pair.sparse, tasks[:1], tmp_path, pair.tokenizer, False, settings, False)


def test_the_twin_is_handed_to_the_controls_and_refused_before_any_search(pair, tmp_path, monkeypatch, capsys):
    given = {}

    def measured(model, circuit, **options):
        given.update(options)
        return {"verdict": ["as expected"]}

    monkeypatch.setattr(many, "controls", measured)
    found = Circuit("for_while", {}, [], {}, fingerprint=fingerprint(pair.sparse))
    monkeypatch.setattr(many, "prune", lambda *args, **settings: found)
    pair.sparse.save_pretrained(tmp_path / "twin")
    arguments = (pair.sparse, ("for_while",), tmp_path / "found", pair.tokenizer, True, SETTINGS, False)
    prune_tasks(*arguments, dense_twin=tmp_path / "twin")
    assert isinstance(given["dense_twin"], bridges.SparseTransformer) and given["dense_twin"] is not pair.sparse
    assert "as expected" in capsys.readouterr().out
    monkeypatch.setattr(many, "prune", None)  # a search would fail
    with pytest.raises(ValueError, match="dense_twin=GPT2LMHeadModel must be"):
        prune_tasks(pair.sparse, TASKS, tmp_path / "other", pair.tokenizer, dense_twin=pair.dense)


def test_a_folder_of_another_model_is_refused(pair, tmp_path):
    Circuit("for_while", {}, [], {}, fingerprint="bf16:0 fp16:0").save(tmp_path / "for_while")
    with pytest.raises(ValueError, match="holds circuits of another model"):
        prune_tasks(pair.sparse, ("for_while",), tmp_path, pair.tokenizer, False, SETTINGS, False)


def test_the_command_finds_a_circuit_shows_a_node_and_refuses_in_one_line(monkeypatch, capsys, pair, tmp_path):
    folder = str(pair.sparse.name_or_path)
    tokenizer = ("--tokenizer", pair.tokenizer.name_or_path)
    quick = ("--no-controls", "--steps", 4, "--target-loss", 0.5, "--out", tmp_path / "found")
    monkeypatch.setattr(many, "prune", lambda *a, **k: bridges.prune(*a, **{**k, "n": 6, "text_tokens": 256}))
    status, out, _ = run(monkeypatch, capsys, "circuit", folder, "--task", "for_while", *tokenizer, *quick)
    assert status == 0 and out.startswith("for_while: ") and (tmp_path / "found/for_while/circuit.json").is_file()
    monkeypatch.setattr(cli, "feature", partial(bridges.feature, text_tokens=256))
    status, out, _ = run(monkeypatch, capsys, "circuit", folder, "--feature", "final.read.5", *tokenizer)
    assert status == 0 and out.startswith("final.read.5: active at")
    sparse_model().save_pretrained(tmp_path / "sparse")
    for arguments, message in (
        ((folder, "--task", "for_while", "--no-controls", "--dense-twin", "there"), "'there' is one of the controls"),
        ((folder, "--task", "for_while", "--method", "best", *tokenizer), "method='best' is invalid"),
        ((folder, "--task", "nothing"), "--task 'nothing' must be all, or one of single_double_quote"),
        ((folder, "--feature", "9.attn.q.1", *tokenizer), "is not in the model"),
        ((str(pair.dense.name_or_path), "--feature", "0.attn.q.1"), "must be a SparseTransformer"),
    ):
        status, out, err = run(monkeypatch, capsys, "circuit", *arguments)
        assert status == 2 and not out and message in err and err.count("\n") == 1
