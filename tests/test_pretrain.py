import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from pairs import gpt2, sparse_model, tokens

import bridges
from bridges.models.sparse.model import SparseTransformer
from bridges.pretrain import pretrain
from bridges.sparsity import projection
from bridges.sparsity.pretraining import Pretrainer
from bridges.sparsity.settings import PretrainConfig

DATA = tokens(20, 8, seed=21)
BASE = {"steps": 4, "batch_size": 4, "lr": 1e-2, "move_every": 2, "log_every": 2, "progress": False}
SPARSE = {"start_density": 0.6, "target_density": 0.3}


def run(data=DATA, sparse=None, **settings):
    """Four steps of a model of one layer, unless other settings are given."""
    return pretrain(sparse or sparse_model(layers=1), data, **{**BASE, **settings})


def weights(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def rows(folder):
    """The rows of `metrics.jsonl` without the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "steps_per_second"} for line in lines]


RESULT_DEPENDS_ON = {
    "steps": (3, {}),
    "batch_size": (3, {}),
    "gradient_accumulation_steps": (2, {}),
    "seq_len": (6, {}),
    "seed": (1, {}),
    "ce_weight": (0.5, {"teacher": gpt2(layers=1)}),
    "kl_weight": (0.5, {"teacher": gpt2(layers=1)}),
    "support": ("projected", {}),
    "target_density": (0.2, SPARSE),
    "start_density": (0.5, SPARSE),
    "anneal": (1.0, SPARSE),
    "schedule": ("linear", {**SPARSE, "anneal": 1.0}),
    "min_per_channel": (3, SPARSE),
    "move_every": (1, SPARSE),
    "move_by": ("magnitude", {**SPARSE, "anneal": 0.0, "move_every": 1}),
    "move_share": (0.5, SPARSE),
    "move_until": (0.1, {**SPARSE, "anneal": 0.0, "move_every": 1}),
    "lr": (2e-2, {}),
    "warmup": (1.0, {}),
    "weight_decay": (5.0, {}),
    "eps": (1e-2, {}),
    "mixed_precision": ("bf16", {"sparse": lambda: sparse_model(layers=1, dtype=torch.float32)}),
}
"""Another value of each setting that the weights depend on, and the settings that both runs have beside it."""

TESTED_BY = {
    "float32_precision": "test_the_precision_of_float32_products_holds_inside_and_the_users_own_is_back_afterwards",
    "cuda_graph": "test_a_graph_is_refused_where_it_would_go_wrong",
    "eval_every": "test_rows_hold_mean_losses_and_held_out_ones_where_they_are_due",
    "eval_tokens": "test_rows_hold_mean_losses_and_held_out_ones_where_they_are_due",
    "log_every": "test_rows_hold_mean_losses_and_held_out_ones_where_they_are_due",
    "checkpoint_every": "test_a_run_ended_by_ctrl_c_continues_to_the_same_bytes",
    "output_dir": "test_without_output_dir_nothing_is_written_and_the_model_is_left_in_its_mode",
    "resume": "test_a_run_ended_by_ctrl_c_continues_to_the_same_bytes",
    "report_to": "test_the_tracker_gets_the_rows_and_ends_the_run",
    "progress": "test_the_plan_and_a_bar_are_shown_on_stderr_alone",
}


def test_every_setting_has_a_test():
    assert RESULT_DEPENDS_ON.keys() | TESTED_BY.keys() == PretrainConfig.model_fields.keys()
    for name in TESTED_BY.values():
        assert f"def {name}(" in Path(__file__).read_text()


@pytest.mark.parametrize("name", RESULT_DEPENDS_ON)
def test_a_setting_changes_the_result(name):
    value, settings = RESULT_DEPENDS_ON[name]
    found = []
    for extra in ({}, {name: value}):
        shared = {key: one() if key == "sparse" else one for key, one in settings.items()}
        found.append(weights(run(**{**shared, **extra})))
    assert not torch.equal(*found)


def test_without_output_dir_nothing_is_written_and_the_model_is_left_in_its_mode(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, teacher = sparse_model(layers=1).eval(), gpt2(layers=1).train()
    before = weights(teacher)
    assert run(sparse=model, teacher=teacher) is model
    assert not model.training and teacher.training and torch.equal(before, weights(teacher))
    assert all(p.grad is None for p in [*model.parameters(), *teacher.parameters()])
    assert all(p.requires_grad for p in teacher.parameters())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", [None, "highest", "medium"])
def test_the_precision_of_float32_products_holds_inside_and_the_users_own_is_back_afterwards(tmp_path, precision):
    model, seen = sparse_model(layers=1, dtype=torch.float32), set()
    model.lm_head.register_forward_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")
    try:
        run(sparse=model, output_dir=tmp_path, float32_precision=precision)
        with pytest.raises(ValueError, match=r"lr=0\.5, but the run was started"):
            run(sparse=model, output_dir=tmp_path, float32_precision=precision, resume=True, lr=0.5)
        assert torch.get_float32_matmul_precision() == "high" and seen == {precision or "high"}
        torch.set_float32_matmul_precision("highest")
        if precision != "highest":
            with pytest.raises(ValueError, match=f"float32_precision='highest', but .*='{precision or 'high'}'"):
                run(output_dir=tmp_path, resume=True, float32_precision="highest")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_highest_gives_the_weights_of_the_default_bit_for_bit():
    models = [sparse_model(layers=1, dtype=torch.float32) for _ in range(2)]
    run(sparse=models[0])
    run(sparse=models[1], float32_precision="highest")
    assert torch.equal(*map(weights, models))


def test_another_mixed_precision_by_a_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match=r"='bf16'.* mixed_precision='no' of pretrain"):
        run(output_dir=tmp_path / "run")
    run(mixed_precision="bf16", sparse=sparse_model(layers=1, dtype=torch.float32))
    assert not (tmp_path / "run").exists()


def test_the_global_random_state_is_left_as_it_was():
    model = sparse_model(layers=1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run(sparse=model)
    assert torch.equal(torch.rand(2), expected)


def test_rows_hold_mean_losses_and_held_out_ones_where_they_are_due(tmp_path, monkeypatch):
    seen, step = [], Pretrainer.train_step

    def noted(self, batches):
        seen.append(step(self, batches))
        return seen[-1]

    monkeypatch.setattr(Pretrainer, "train_step", noted)
    teacher, heldout = bridges.as_residual(gpt2(layers=1)), tokens(6, 8, seed=4)
    settings = {"steps": 5, "eval_every": 3, "eval_tokens": 17, "ce_weight": 0.5, "kl_weight": 2.0}
    model = run(teacher=teacher, eval_data=heldout, output_dir=tmp_path, **settings)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [2, 3, 4, 5]
    assert [name for name in found[1] if name.startswith("eval")] == ["eval/ce", "eval/kl"]
    assert "eval/ce" not in found[0]
    assert found[0]["train/ce"] == pytest.approx(((seen[0].ce + seen[1].ce) / 2).item(), rel=1e-12)
    assert found[2]["train/kl"] == pytest.approx(seen[3].kl.item(), rel=1e-12)
    assert found[0]["train/loss"] == pytest.approx(0.5 * found[0]["train/ce"] + 2 * found[0]["train/kl"], rel=1e-12)
    with torch.no_grad():  # three rows of eight tokens hold the 17 that are asked for
        log_q, log_p = model(heldout[:3]).logits.log_softmax(-1), teacher.residuals(heldout[:3])[1].log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    ce = -log_q[:, :-1].gather(2, heldout[:3, 1:, None]).mean().item()
    assert found[-1]["eval/kl"] == pytest.approx(kl, rel=1e-9)
    assert found[-1]["eval/ce"] == pytest.approx(ce, rel=1e-9)


def test_what_is_saved_is_what_is_returned(tmp_path):
    model = run(output_dir=tmp_path / "run", **SPARSE)
    again = SparseTransformer.from_pretrained(tmp_path / "run/sparse")
    assert torch.equal(weights(model), weights(again))
    assert projection.density(again) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("support", ["moving", "projected"])
def test_a_run_ended_by_ctrl_c_continues_to_the_same_bytes(tmp_path, monkeypatch, support):
    settings = {"steps": 9, "log_every": 4, "checkpoint_every": 100, "support": support, **SPARSE}
    settings |= {"teacher": gpt2(layers=1), "sparse": None}
    run(**settings, output_dir=tmp_path / "whole")
    step = Pretrainer.train_step

    def interrupted(self, batches):
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batches)

    monkeypatch.setattr(Pretrainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(**settings, output_dir=tmp_path / "run")
    monkeypatch.undo()
    assert (tmp_path / "run/checkpoints/step-00000006").is_dir()
    run(**settings, output_dir=tmp_path / "run", resume=True)
    name = "sparse/sparse_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    finished = run(**settings, output_dir=tmp_path / "run", resume=True)
    assert torch.equal(weights(finished), weights(SparseTransformer.from_pretrained(tmp_path / "whole/sparse")))
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_checkpoints_come_every_so_many_steps_and_two_are_kept(tmp_path):
    run(steps=7, checkpoint_every=2, output_dir=tmp_path)
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["step-00000006", "step-00000007"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    step = Pretrainer.train_step

    def poisoned(self, batches):
        if self.step == 2:
            with torch.no_grad():
                self.model.final_logits_bias[0] = float("nan")
        return step(self, batches)

    monkeypatch.setattr(Pretrainer, "train_step", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 4: the loss is nan .* the last checkpoint is kept"):
        run(output_dir=tmp_path, checkpoint_every=2, steps=6)
    assert [row["step"] for row in rows(tmp_path)] == [2]


def test_the_tracker_gets_the_rows_and_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    monkeypatch.chdir(tmp_path)
    run(report_to="wandb", output_dir=tmp_path / "run")
    wandb.teardown()
    assert wandb.run is None and len(list(tmp_path.glob("run/wandb/offline-run-*"))) == 1
    assert (tmp_path / "run/wandb_run_id").is_file() and len(rows(tmp_path / "run")) == 2


def test_the_plan_and_a_bar_are_shown_on_stderr_alone(capfd):
    run(progress=True, **SPARSE)
    out, err = capfd.readouterr()
    assert not out
    assert (
        re.search(r"4 steps of 4 rows: 128 tokens, (about \d|under 1 s)", err)
        and "density: 0.6 to 0.3 over the first 35%" in err
    )
    run()
    assert capfd.readouterr() == ("", "")


def test_rows_are_sampled_from_the_teacher_where_no_data_are_given():
    assert not torch.equal(weights(sparse_model(layers=1)), weights(run(None, teacher=gpt2(layers=1), seq_len=6)))


REFUSED = {
    "no data and no teacher": (lambda: {"data": None}, "data=None needs a teacher"),
    "not a sparse model": (lambda: {"sparse": gpt2(layers=1)}, "sparse=GPT2LMHeadModel must be a SparseTransformer"),
    "another vocabulary": (lambda: {"teacher": gpt2(layers=1, vocab=19)}, "19 and 17 tokens"),
    "an unknown setting": (lambda: {"ridge": 1}, "ridge=1 is not a setting of pretrain"),
    "a density that grows": (lambda: {"start_density": 0.1, "target_density": 0.2}, "a run only prunes"),
    "a fixed support with a target": (lambda: {"support": "fixed", "target_density": 0.1}, "support='fixed' keeps"),
    "resume without a folder": (lambda: {"resume": True}, "resume=True needs output_dir"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        run(**arguments())
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_dict_as_config_is_refused(unchecked):
    with pytest.raises(ValueError, match=r"config=\{'steps': 1\} must be a PretrainConfig"):
        run(config={"steps": 1})


def test_a_model_is_no_teacher_of_itself_and_a_used_folder_is_not_overwritten(tmp_path):
    model = sparse_model(layers=1)
    with pytest.raises(ValueError, match="teacher and sparse are the same model"):
        run(sparse=model, teacher=model)
    run(output_dir=tmp_path)
    with pytest.raises(ValueError, match="already holds a run"):
        run(output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"resume=True with lr=0\.5, but the run was started with lr=0\.01"):
        run(output_dir=tmp_path, resume=True, lr=0.5)
    with pytest.raises(ValueError, match="resume=True with other data"):
        run(tokens(20, 8, seed=2), output_dir=tmp_path, resume=True)


def test_a_frozen_model_has_nothing_to_train():
    model = sparse_model(layers=1).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        run(sparse=model)


def test_a_graph_is_refused_where_it_would_go_wrong():
    """What it computes: tests/sparsity/test_pretraining.py, and on a GPU tests/gpu."""
    with pytest.raises(ValueError, match="cuda_graph=True needs one process and a model without dropout, got 1 and"):
        pretrain(sparse_model(layers=1, dropout=0.1), tokens(8, 8), cuda_graph=True, progress=False)
