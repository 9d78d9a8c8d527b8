from pathlib import Path

import pytest
import torch
from fits import BASE, DATA, SPARSE, rows, run, same, shallow
from pairs import sparse_model, tokens

from bridges.config import FitConfig
from bridges.fit import fit
from bridges.sparsity.projection import density, project

RESULT_DEPENDS_ON = {
    "steps": (2, {}),
    "batch_size": (3, {}),
    "gradient_accumulation_steps": (2, {}),
    "seq_len": (6, {}),
    "lr": (2e-2, {}),
    "seed": (1, {}),
    "k": (3, {}),
    "closed_form": (False, {}),
    "closed_form_tokens": (60, {}),
    "ridge": (1e-2, {}),
    "decoder_attribution": ("effect", {}),
    "massive_threshold": (1.5, {}),
    "sites": (("0.mlp",), {}),
    "site_map": ((("0.mlp", "0.attn"), ("final", "final")), {}),
    "sites_per_step": (1, {}),
    "nmse_weight": (0.5, {}),
    "kl_dense_to_sparse_weight": (0.5, {}),
    "kl_sparse_to_dense_weight": (0.5, {}),
    "path_weight": (1.0, {}),
    "ce_weight": (0.0, SPARSE),
    "train_sparse": (True, {}),
    "target_density": (0.3, SPARSE),
    "start_density": (0.6, SPARSE),
    "anneal": (1.0, SPARSE),
    "support": ("moving", {**SPARSE, "start_density": 0.6, "move_every": 1}),
    "move_every": (1, {**SPARSE, "support": "moving", "start_density": 0.6, "move_every": 2, "steps": 4}),
    "move_share": (0.5, {**SPARSE, "support": "moving", "start_density": 0.6, "move_every": 1}),
    "sparse_lr": (1e-3, SPARSE),
    "sparse_weight_decay": (5.0, SPARSE),
    "sparse_eps": (1e-2, SPARSE),
    "mixed_precision": ("bf16", {"dense": shallow(dtype=torch.float32)}),
    "eval_tokens": (8, {"eval_data": tokens(4, 8)}),
    "sampled_rows": (30, {"data": None, "steps": 1, "sampled_rows": 20}),
}
"""Another value of each setting that a result depends on, and the settings that both runs have beside it."""


TESTED_BY = {
    "float32_precision": "test_float32_precision.py::test_the_precision_holds_inside_and_the_users_own_is_back_after",
    "moments_gib": "test_settings.py::test_sites_solved_in_groups_for_lack_of_memory_give_the_same_bridges",
    "eval_every": "test_settings.py::test_held_out_figures_come_every_so_many_steps",
    "checkpoint_every": "test_settings.py::test_checkpoints_come_every_so_many_steps_and_two_are_kept",
    "output_dir": "test_settings.py::test_without_output_dir_nothing_is_written",
    "resume": "test_resume.py::test_a_run_ended_by_ctrl_c_continues_to_the_same_bytes",
    "report_to": "../fitting/test_tracking.py::test_a_run_in_wandb_holds_settings_curves_report_plot_and_artifact",
    "progress": "test_settings.py::test_the_plan_and_a_bar_are_shown_on_stderr_alone",
}
"""The settings that say how a fit runs, not what it computes."""


def test_every_setting_has_a_test():
    assert RESULT_DEPENDS_ON.keys() | TESTED_BY.keys() == FitConfig.model_fields.keys()
    for file, name in (test.split("::") for test in TESTED_BY.values()):
        assert f"def {name}(" in (Path(__file__).parent / file).read_text()


@pytest.fixture(scope="module")
def defaults():
    """The runs that most settings are compared with."""
    return {"frozen": run(), "training": run(**SPARSE)}


@pytest.mark.parametrize("name", RESULT_DEPENDS_ON)
def test_a_setting_changes_the_result(name, defaults):
    value, settings = RESULT_DEPENDS_ON[name]
    shared = "training" if settings is SPARSE else "frozen" if not settings else None
    before = run(**settings) if shared is None else defaults[shared]
    assert not same(before, run(**{**settings, name: value}))


def counted_batches(model):
    """A list that grows by one with every batch that a sparse model embeds."""
    counted = []
    model.transformer.wte.register_forward_hook(lambda *_: counted.append(1))
    return counted


def test_sites_solved_in_groups_for_lack_of_memory_give_the_same_bridges():
    """Each further group of sites takes one more pass over 10 rows in batches of 4, and the one set aside."""
    one, three = shallow(sparse_model), shallow(sparse_model)
    batches = counted_batches(one), counted_batches(three)
    assert same(run(sparse=one, steps=0), run(sparse=three, steps=0, moments_gib=1e-9))
    assert len(batches[1]) - len(batches[0]) == 2 * (3 + 1)


def test_mixed_precision_gives_figures_near_those_of_full_precision():
    exact, mixed = (run(dense=shallow(dtype=torch.float32), sparse=shallow(sparse_model, dtype=torch.float32), steps=1,
                        mixed_precision=precision).report.mean for precision in ("no", "bf16"))  # fmt: skip
    assert abs(mixed["nmse_decode"] / exact["nmse_decode"] - 1) < 0.1


def test_single_settings_go_before_those_of_a_config():
    config = FitConfig(**{**BASE, "steps": 9, "lr": 3e-2})
    assert same(fit(shallow(), shallow(sparse_model), DATA, config=config, steps=2), run(steps=2, lr=3e-2))


def test_held_out_figures_come_every_so_many_steps(tmp_path):
    run(steps=5, eval_every=2, output_dir=tmp_path / "run")
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if "eval/mean/nmse_decode" in row] == [2, 4]
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert {"eval/kl_sparse_to_dense/0.mlp", "eval/nmse_encode/final", "eval/dense_ce"} <= found[1].keys()


def test_checkpoints_come_every_so_many_steps_and_two_are_kept(tmp_path):
    run(steps=5, checkpoint_every=2, output_dir=tmp_path / "run")
    assert sorted(f.name for f in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000004", "step-00000005"]


def test_the_plan_and_a_bar_are_shown_on_stderr_alone(capfd):
    run(steps=1)
    assert capfd.readouterr() == ("", "")
    run(steps=1, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "3 sites" in err and "1 steps of 4 rows" in err and "1/1" in err


def test_without_output_dir_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(eval_every=1, checkpoint_every=1)
    assert list(tmp_path.iterdir()) == []


def test_a_moving_support_starts_from_a_pruned_model_and_ends_at_its_density(tmp_path):
    """The bridges are fitted to the streams of the pruned model."""
    sparse = shallow(sparse_model)
    moving = {**SPARSE, "support": "moving", "start_density": 0.7, "target_density": 0.4, "move_every": 1, "steps": 4}
    run(sparse=sparse, output_dir=tmp_path / "run", **moving)
    kept = [row["kept_fraction"] for row in rows(tmp_path / "run")]
    assert kept == pytest.approx([0.55, 0.4, 0.4, 0.4])
    assert density(sparse) == pytest.approx(0.4, abs=0.02)
    unchanged = shallow(sparse_model)
    before = density(unchanged)
    run(sparse=unchanged, **{**moving, "steps": 0})
    assert density(unchanged) == before


def test_a_moving_support_is_not_filled_up_with_zeros():
    sparse = shallow(sparse_model)
    project(sparse, 0.2, 1)
    with pytest.raises(ValueError, match=r"start_density=1 is far over the sparse model's own density, 0.199"):
        run(sparse=sparse, **{**SPARSE, "target_density": 0.1, "support": "moving", "move_every": 1})
