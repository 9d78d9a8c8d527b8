import json
import struct
from pathlib import Path

import pytest
import torch
import wandb
from pairs import gpt2, sparse_model, tokens
from wandb.proto.wandb_internal_pb2 import Record

from bridges.fit import fit
from bridges.fitting.tracking import Tracker, log_page
from bridges.fitting.trainer import Trainer

SETTINGS = {"steps": 4, "batch_size": 2, "closed_form_tokens": 60, "eval_every": 2, "progress": False}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_kept_in_memory_and_appended_one_line_each(tmp_path):
    tracker = Tracker(tmp_path / "new", "none", {}, 0)
    tracker.log({"step": 1, "train/loss": 0.5})
    assert lines(tmp_path / "new") == [{"step": 1, "train/loss": 0.5}]
    tracker.log({"step": 2, "eval/nmse_decode/final": float("nan")})
    assert tracker.rows[0] == {"step": 1, "train/loss": 0.5}
    assert lines(tmp_path / "new")[1] == {"step": 2, "eval/nmse_decode/final": None}, "no NaN, which JSON does not know"
    tracker.finish(None, None)
    tracker.abort()


def test_without_a_folder_rows_are_kept_in_memory_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = Tracker(None, "none", {}, 0)
    tracker.log({"step": 1, "train/loss": 0.5})
    assert tracker.rows == [{"step": 1, "train/loss": 0.5}] and list(tmp_path.iterdir()) == []


TAILS = {
    "rows after the checkpoint": '{"step": 3}\n{"step": 4}\n',
    "a torn line": '{"step": 3, "train/lo',
    "a torn number": '{"step": 3, "train/loss": 0.',
    "nothing": "",
}


@pytest.mark.parametrize("tail", TAILS)
def test_a_resume_deletes_the_rows_after_its_checkpoint(tmp_path, tail):
    kept = '{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(kept + TAILS[tail])
    tracker = Tracker(tmp_path, "none", {}, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == kept
    tracker.log({"step": 3, "train/loss": 0.5})
    assert [row["step"] for row in tracker.rows] == [row["step"] for row in lines(tmp_path)] == [1, 2, 3]


def test_a_last_line_without_its_end_of_line_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    Tracker(tmp_path, "none", {}, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


# With wandb itself, offline.


def records(path):
    """The records of a .wandb file: a log in blocks of 32 KiB, each record in one or several chunks."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, parts = 7, []
    while place + 7 <= len(data):
        if (remaining := 32768 - place % 32768) < 7:
            place += remaining
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            yield Record.FromString(b"".join(parts))
            parts = []


def read_runs(folder):
    """What each offline run under `folder` holds, oldest first."""
    wandb.teardown()  # its service may still be writing after a run has finished; this waits for its end
    return [list(records(path)) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def history(run):
    """Each logged row by name."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in run
        if record.WhichOneof("record_type") == "history"
    ]


def config(run):
    found = {}
    for record in run:
        if record.WhichOneof("record_type") == "run":
            found |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.WhichOneof("record_type") == "config":
            found |= {item.key: json.loads(item.value_json) for item in record.config.update}
    return found


def run_ids(run):
    return {record.run.run_id for record in run if record.WhichOneof("record_type") == "run"}


def projects(run):
    return {record.run.project for record in run if record.WhichOneof("record_type") == "run"}


def exit_code(run):
    return next(record.exit.exit_code for record in run if record.WhichOneof("record_type") == "exit")


def step_axes(run):
    metrics = [record.metric for record in run if record.WhichOneof("record_type") == "metric"]
    return {metric.name or metric.glob_name: metric.step_metric for metric in metrics}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """wandb as in a fresh process: no mode, no account, nothing written elsewhere."""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home/netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    wandb.teardown()


def tracked(folder, steps=(1, 2, 3)):
    """A run that logs so many steps and ends, and the tracker of it."""
    tracker = Tracker(folder, "wandb", {"lr": 0.5}, 0)
    for step in steps:
        tracker.log({"step": step, "train/loss": 1.0 / step, "lr": 0.5})
    tracker.finish(None, folder)
    return tracker


def logged(run, *names):
    """The values of these names in every row that has one of them."""
    return [tuple(row.get(name) for name in names) for row in history(run) if any(name in row for name in names)]


def test_a_run_of_the_users_is_left_alone_and_the_rows_go_to_one_beside_it(tmp_path, offline):
    mine = wandb.init(dir=str(tmp_path / "mine"), project="quotes", id="mine")
    mine.log({"own": 1.0}, step=900)
    tracked(tmp_path / "run")
    assert wandb.run is mine
    mine.log({"own": 2.0}, step=901)
    mine.finish()
    (theirs,), (ours,) = read_runs(tmp_path / "mine"), read_runs(tmp_path / "run")
    assert logged(theirs, "_step", "own") == [(900, 1.0), (901, 2.0)] and not logged(theirs, "train/loss")
    assert logged(ours, "train/loss", "_step") == [(1.0, 1), (0.5, 2), (1 / 3, 3)]
    assert run_ids(ours) == {(tmp_path / "run/wandb_run_id").read_text()} != run_ids(theirs) == {"mine"}
    assert projects(ours) == {"quotes"} and config(ours)["lr"] == 0.5


@pytest.mark.slow
def test_a_run_that_fails_does_not_end_the_users(tmp_path, offline):
    mine = wandb.init(dir=str(tmp_path / "mine"), id="mine")
    Tracker(tmp_path / "run", "wandb", {}, 0).abort()
    mine.log({"own": 1.0})
    mine.finish()
    (theirs,), (ours,) = read_runs(tmp_path / "mine"), read_runs(tmp_path / "run")
    assert logged(theirs, "own") == [(1.0,)] and (exit_code(theirs), exit_code(ours)) == (0, 1)


@pytest.mark.parametrize("mode", ["argument", "environment"])
def test_where_wandb_is_disabled_nothing_is_recorded_and_no_id_is_kept(tmp_path, offline, monkeypatch, mode):
    if mode == "environment":
        mine = wandb.init(dir=str(tmp_path / "mine"), mode="offline")
        monkeypatch.setenv("WANDB_MODE", "disabled")
    else:
        monkeypatch.delenv("WANDB_MODE")
        mine = wandb.init(mode="disabled")
    assert tracked(tmp_path / "run").run is None and wandb.run is mine
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    mine.finish()


@pytest.mark.slow
@pytest.mark.parametrize("resumed", ["by itself", "inside a run of the user's"])
def test_a_resume_continues_the_run_whose_id_the_folder_holds(tmp_path, offline, resumed):
    tracked(tmp_path / "run", steps=(1, 2))
    if resumed != "by itself":
        mine = wandb.init(dir=str(tmp_path / "mine"))
    tracker = Tracker(tmp_path / "run", "wandb", {}, 2)
    tracker.log({"step": 3, "train/loss": 0.25})
    tracker.abort()
    if resumed != "by itself":
        mine.finish()
    first, second = read_runs(tmp_path / "run")
    assert run_ids(first) == run_ids(second) == {(tmp_path / "run/wandb_run_id").read_text()}
    assert logged(second, "train/loss", "_step") == [(0.25, 3)]


@pytest.mark.slow
def test_a_run_that_the_user_opened_by_the_stored_id_is_logged_to_and_not_ended(tmp_path, offline):
    tracked(tmp_path / "run", steps=(1,))
    mine = wandb.init(dir=str(tmp_path / "mine"), id=(tmp_path / "run/wandb_run_id").read_text(), resume="allow")
    mine.log({"own": 1.0}, step=900)
    tracker = Tracker(tmp_path / "run", "wandb", {}, 1)
    tracker.log({"step": 2, "train/loss": 0.25})
    tracker.finish(None, None)
    mine.log({"own": 2.0})
    mine.finish()
    (theirs,) = read_runs(tmp_path / "mine")
    assert logged(theirs, "own") == [(1.0,), (2.0,)] and logged(theirs, "train/loss", "fit_step") == [(0.25, 2)]


@pytest.fixture
def agent(offline, monkeypatch):
    """The environment in which a sweep's agent runs a trial."""
    wandb.teardown()
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "trial1")


@pytest.mark.slow
@pytest.mark.parametrize("opened", ["by the user", "by fit"])
def test_in_a_sweep_the_rows_go_to_the_agents_run(tmp_path, agent, opened):
    folder = tmp_path / "run" if opened == "by fit" else tmp_path / "mine"
    if opened == "by the user":
        mine = wandb.init(dir=str(folder), config={"lr": 7.0})
        mine.log({"own": 1.0}, step=900)
    tracker = tracked(tmp_path / "run")
    assert (tmp_path / "run/wandb_run_id").read_text() == tracker.run.id == "trial1"
    if opened == "by the user":
        mine.log({"own": 2.0})
        mine.finish()
    (trial,) = read_runs(folder)
    assert run_ids(trial) == {"trial1"} and exit_code(trial) == 0
    if opened == "by fit":
        assert logged(trial, "train/loss", "_step") == [(1.0, 1), (0.5, 2), (1 / 3, 3)]
        return
    assert logged(trial, "train/loss", "fit_step") == [(1.0, 1), (0.5, 2), (1 / 3, 3)]
    assert logged(trial, "own") == [(1.0,), (2.0,)], "the user's rows after the fit are not dropped"
    assert config(trial)["lr"] == 7.0 and config(trial)["fit"] == {"lr": 0.5}
    assert step_axes(trial)["train/*"] == "fit_step"


@pytest.mark.slow
def test_a_run_in_wandb_holds_settings_curves_report_plot_and_artifact(tmp_path, offline):
    found = fit(
        gpt2(layers=1),
        sparse_model(layers=1),
        tokens(12, 8),
        report_to="wandb",
        output_dir=tmp_path / "run",
        **SETTINGS,
    )
    (run,) = read_runs(tmp_path / "run")
    settings = config(run)
    assert settings["settings"]["lr"] == 1e-3 and settings["sites"] == ["0.attn", "0.mlp", "final"]
    assert settings["settings"]["eval_every"] == 2 and set(settings["versions"]) >= {"torch", "sparse-bridges"}

    rows = history(run)
    curves = [row for row in rows if "train/loss" in row]
    assert [row["_step"] for row in curves] == [1, 2, 3, 4]
    for row, logged in zip(curves, found.history, strict=True):
        for name, value in logged.items():
            assert name == "step" or row[name] == value, name
    for site in ("0.attn", "0.mlp", "final"):
        assert f"train/nmse_encode/{site}" in curves[0] and f"train/nmse_decode/{site}" in curves[0]
    evaluated = [row["_step"] for row in curves if "eval/kl_sparse_to_dense/0.mlp" in row]
    assert evaluated == [2, 4] and "eval/mean/nmse_decode" in curves[1] and "tokens_per_second" in curves[0]

    def stored(name):
        path = next(row[f"{name}/path"] for row in rows if f"{name}/path" in row)
        return next((tmp_path / "run").glob(f"wandb/offline-run-*/files/{path}")).read_bytes()

    content = json.loads(stored("report"))
    assert content["columns"][:2] == ["name", "nmse_encode"] and [row[0] for row in content["data"]] == found.sites
    assert content["data"][1][content["columns"].index("nmse_decode")] == found.report.sites[1].nmse_decode
    assert stored("quality") == (tmp_path / "run/quality.png").read_bytes()

    artifacts = [record.artifact for record in run if record.WhichOneof("record_type") == "artifact"]
    (artifact,) = [artifact for artifact in artifacts if artifact.type == "bridges"]
    metadata = json.loads(artifact.metadata)
    assert metadata["final/mean/nmse_decode"] == found.report.mean["nmse_decode"]
    assert metadata["tokens"] == found.report.tokens
    names = {Path(entry.path).name for entry in artifact.manifest.contents}
    assert names == {"config.json", "bridges.safetensors", "report.json", "history.json", "README.md"}


@pytest.mark.slow
def test_without_an_account_or_a_mode_a_line_says_so_and_a_resume_continues_the_same_run(
    tmp_path, offline, monkeypatch, capfd
):
    monkeypatch.delenv("WANDB_MODE")
    models, data = (gpt2(layers=1), sparse_model(layers=1)), tokens(12, 8)
    settings = {**SETTINGS, "report_to": "wandb", "output_dir": tmp_path / "run"}
    step = Trainer.train_step

    def stopped(self, batches):
        if self.step == 2:
            raise RuntimeError("the power went")
        return step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped)
        with pytest.raises(RuntimeError, match="the power went"):
            fit(*models, data, **settings, checkpoint_every=2)
    lines_said = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(lines_said) == 1 and lines_said[0].startswith("wandb: no account and no WANDB_MODE set")
    found = fit(*models, data, **settings, checkpoint_every=2, resume=True)

    first, second = read_runs(tmp_path / "run")
    assert run_ids(first) == run_ids(second) == {(tmp_path / "run/wandb_run_id").read_text()}
    assert [row["_step"] for row in history(first) if "train/loss" in row] == [1, 2]
    assert [row["_step"] for row in history(second) if "train/loss" in row] == [3, 4]
    assert [row["step"] for row in found.history] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_report_that_a_kill_kept_from_wandb_is_sent_by_the_resume(tmp_path, offline, monkeypatch):
    models, data = (gpt2(layers=1), sparse_model(layers=1)), tokens(12, 8)
    settings = {**SETTINGS, "report_to": "wandb", "output_dir": tmp_path / "run", "resume": True}

    def killed(self, *_):
        self.run.finish()
        raise RuntimeError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "finish", killed)
        with pytest.raises(RuntimeError, match="the power went"):
            fit(*models, data, **settings)
    for _ in range(2):  # the second time there is nothing left to do
        fit(*models, data, **settings)
    first, second = read_runs(tmp_path / "run")
    assert run_ids(first) == run_ids(second)
    tables = [[row for row in history(run) if "report/path" in row] for run in (first, second)]
    assert tables[0] == [] and len(tables[1]) == 1


def test_bridges_are_the_same_with_and_without_reporting(tmp_path, monkeypatch):
    """With wandb disabled nothing is recorded, and the bridges are the same to the bit."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    models, data = (gpt2(layers=1), sparse_model(layers=1)), tokens(12, 8)
    silent = fit(*models, data, **SETTINGS)
    reported = fit(*models, data, report_to="wandb", **SETTINGS)
    for one, two in zip(silent.parameters(), reported.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_page_goes_to_the_run_that_the_folder_reported_to_and_nowhere_without_one(tmp_path, offline, monkeypatch):
    page = tmp_path / "index.html"
    page.write_text("<p>seen</p>")
    log_page(tmp_path / "run", page)
    assert not (tmp_path / "run").exists()
    tracked(tmp_path / "run")
    log_page(tmp_path / "run", page)
    *_, last = read_runs(tmp_path / "run")
    assert run_ids(last) == {(tmp_path / "run/wandb_run_id").read_text()}
    (logged_page,) = (tmp_path / "run").glob("wandb/offline-run-*/files/media/html/page_*.html")
    assert "<p>seen</p>" in logged_page.read_text()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log_page(tmp_path / "run", page)
    assert len(read_runs(tmp_path / "run")) == 2
