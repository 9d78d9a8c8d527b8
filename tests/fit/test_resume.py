import json
import os
import signal
from importlib import import_module

import pytest
import torch
from fits import SPARSE, files, raiser, rows, run, same, shallow
from pairs import sparse_model
from safetensors.torch import save_file

from bridges.fitting.checkpoint import last_checkpoint
from bridges.fitting.trainer import Trainer
from bridges.models.sparse.residual import SparseResidual

fit_module = import_module("bridges.fit")


@pytest.mark.parametrize("joint", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run_at_the_last_good_checkpoint(tmp_path, monkeypatch, joint):
    settings = {"checkpoint_every": 1, **(SPARSE if joint else {})}
    run(**settings, output_dir=tmp_path / "whole")
    step = Trainer.train_step

    def poisoned(self, batches):
        if self.step == 2:
            with torch.no_grad():
                self.pair.bridge_set["0.mlp"].decoder_bias[0] = float("nan")
        return step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    with pytest.raises(
        FloatingPointError, match=r"step 3: nmse_decode at site 0\.mlp is nan; the last checkpoint is kept"
    ):
        run(**settings, output_dir=tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    assert sorted(f.name for f in (tmp_path / "run/checkpoints").iterdir())[-1] == "step-00000002"
    monkeypatch.undo()
    run(**settings, output_dir=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def interrupt(monkeypatch, at_evaluation, signals):
    """The process sends itself signals during its n-th held-out evaluation."""
    seen, measure = [], fit_module.measure

    def measured(*args, **kwargs):
        seen.append(1)
        if len(seen) == at_evaluation:
            for number in signals:
                os.kill(os.getpid(), number)
        return measure(*args, **kwargs)

    monkeypatch.setattr(fit_module, "measure", measured)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "joint"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_run_ended_by_ctrl_c_continues_to_the_same_bytes(tmp_path, monkeypatch, number, joint):
    settings = {"eval_every": 1, "steps": 5, **(SPARSE if joint else {})}
    run(**settings, output_dir=tmp_path / "whole")
    interrupt(monkeypatch, 3, [number])
    with pytest.raises(KeyboardInterrupt):
        run(**settings, output_dir=tmp_path / "run")
    monkeypatch.undo()
    assert (tmp_path / "run/checkpoints/step-00000003").is_dir() and len(rows(tmp_path / "run")) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    found = run(**settings, output_dir=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert [row["step"] for row in found.history] == [1, 2, 3, 4, 5]


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path, monkeypatch):
    settings = {"eval_every": 1, "steps": 5, "output_dir": tmp_path}
    interrupt(monkeypatch, 3, [signal.SIGINT, signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        run(**settings)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000000"]


def test_a_run_without_output_dir_can_be_interrupted_too(monkeypatch):
    interrupt(monkeypatch, 2, [signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        run(eval_every=1)


def test_a_finished_run_resumed_returns_its_result_without_another_step(tmp_path, monkeypatch):
    trained = shallow(sparse_model)
    first = run(sparse=trained, **SPARSE, output_dir=tmp_path)
    before = files(tmp_path), rows(tmp_path)
    monkeypatch.setattr(Trainer, "train_step", raiser(AssertionError("a step was made")))
    sparse = shallow(sparse_model)
    again = run(sparse=sparse, **SPARSE, output_dir=tmp_path, resume=True)
    assert same(again, first) and again.history == first.history and again.report == first.report
    assert (files(tmp_path), rows(tmp_path)) == before
    assert all(torch.equal(p, q) for p, q in zip(sparse.parameters(), trained.parameters(), strict=True))


def test_a_resume_without_a_checkpoint_starts_the_run(tmp_path):
    assert same(run(output_dir=tmp_path / "new", resume=True), run())


def test_a_run_killed_after_its_last_step_is_measured_without_another_step(tmp_path, monkeypatch):
    run(output_dir=tmp_path / "whole")
    monkeypatch.setattr(fit_module, "measure", raiser(SystemExit))
    with pytest.raises(SystemExit):
        run(output_dir=tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "train_step", raiser(AssertionError("a step was made")))
    run(output_dir=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_finished_run_resumed_returns_bridges_on_the_dense_models_device(tmp_path):
    """As a fresh one does. A machine without accelerator has "meta" as its only other device."""

    class OnMeta(SparseResidual):
        device = torch.device("meta")

    dense, sparse = shallow(sparse_model, seed=5), shallow(sparse_model)
    run(dense=dense, sparse=sparse, output_dir=tmp_path)
    found = run(dense=OnMeta(dense), sparse=sparse, output_dir=tmp_path, resume=True)
    assert {tensor.device.type for tensor in found.tensors().values()} == {"meta"}


def test_checkpoints_keep_the_names_of_their_files_and_tensors(tmp_path, monkeypatch):
    """So that a run of an earlier version resumes."""
    stop = raiser(SystemExit)
    monkeypatch.setattr(fit_module, "measure", stop)
    with pytest.raises(SystemExit):
        run(checkpoint_every=1, output_dir=tmp_path / "frozen")
    with pytest.raises(SystemExit):
        run(train_sparse=True, output_dir=tmp_path / "trained")
    frozen, trained = (last_checkpoint(tmp_path / name / "checkpoints").tensors for name in ("frozen", "trained"))
    assert frozen.keys() == {"bridges", "bridge_optimizer", "standardized", "best"}
    assert {"0.exp_avg", "0.exp_avg_sq", "0.step"} <= frozen["bridge_optimizer"].keys()
    assert {"0.attn.encoder_weight", "final.decoder_bias"} <= frozen["bridges"].keys()
    assert trained.keys() == {"bridges", "bridge_optimizer", "standardized", "sparse", "sparse_optimizer", "supports"}
    assert "transformer.wte.weight" in trained["sparse"].keys() & trained["supports"].keys()


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_checkpoint_of_an_earlier_version_resumes_unless_it_has_the_interchange_loss(tmp_path, monkeypatch, weight):
    """That version stored the loss in a file of its own where its weight was not 0."""
    run(output_dir=tmp_path / "whole")
    interrupt(monkeypatch, 2, [signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        run(eval_every=1, output_dir=tmp_path / "run")
    monkeypatch.undo()
    for state in (tmp_path / "run/checkpoints").glob("step-*/state.json"):
        stored = json.loads(state.read_text())
        stored["settings"] |= {"interchange_weight": weight, "interchange_pairs": 512}
        state.write_text(json.dumps(stored))
        if weight:
            save_file({"0.attn.squares": torch.ones(12)}, state.parent / "carried.safetensors")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    if weight:
        with pytest.raises(ValueError, match=r"started with interchange_weight=0\.5, and the interchange loss left"):
            run(eval_every=1, output_dir=tmp_path / "run", resume=True)
        assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before
    else:
        run(eval_every=1, output_dir=tmp_path / "run", resume=True)
        name = "bridges.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
