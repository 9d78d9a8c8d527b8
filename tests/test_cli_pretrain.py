"""`bridges pretrain` as a user meets it."""

import pytest
from pairs import gpt2, sparse_model
from test_cli import run

from bridges.models.sparse.model import SparseTransformer
from bridges.sparsity import projection


@pytest.fixture
def config(tmp_path):
    """A saved teacher, and a run file that describes a new sparse model."""
    gpt2().float().save_pretrained(tmp_path / "teacher")
    path = tmp_path / "pretrain.toml"
    path.write_text(
        "[sparse]\nd_model = 16\nn_head = 2\nd_head = 4\nn_layer = 1\nvocab_size = 17\nblock_size = 12\n"
        f'[teacher]\npath = "{tmp_path}/teacher"\n'
        "[pretrain]\nsteps = 4\nseq_len = 8\nbatch_size = 2\nstart_density = 0.5\ntarget_density = 0.25\n"
        f'move_every = 2\nprogress = false\noutput_dir = "{tmp_path}/run"\n'
    )
    return path


def test_pretrain_trains_a_new_model_and_carries_on_with_a_saved_one(monkeypatch, capsys, config, tmp_path):
    status, out, err = run(monkeypatch, capsys, "pretrain", config)
    assert (status, err) == (0, "") and f"Written to {tmp_path / 'run/sparse'}" in out
    trained = SparseTransformer.from_pretrained(tmp_path / "run/sparse")
    assert projection.density(trained) == pytest.approx(0.25, abs=0.03)
    again = ("--sparse.path", tmp_path / "run/sparse", "--pretrain.output_dir", tmp_path / "more")
    settings = ("--pretrain.start_density=0.25", "--pretrain.target_density=0.1", "--pretrain.min_per_channel", "0")
    config.write_text(config.read_text().replace("d_model = 16\nn_head = 2\nd_head = 4\nn_layer = 1\n", ""))
    config.write_text(config.read_text().replace("vocab_size = 17\nblock_size = 12\n", ""))
    status, _, err = run(monkeypatch, capsys, "pretrain", config, *again, *settings)
    assert (status, err) == (0, "")
    assert projection.density(SparseTransformer.from_pretrained(tmp_path / "more/sparse")) == pytest.approx(
        0.1, abs=0.02
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pretrain.ridge", "1"), "ridge=1 is not a setting of pretrain"),
        (("--fit.steps", "1"), "'--fit.steps' is not an option; settings are given as --pretrain.NAME VALUE"),
        (("--sparse.width", "4"), "width=4 is not a key of SparseConfig"),
        (("--teacher.dtype", "float3"), "[teacher] dtype='float3' must be float32"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(monkeypatch, capsys, config, tmp_path, arguments, message):
    status, out, err = run(monkeypatch, capsys, "pretrain", config, *arguments)
    assert status == 2 and not out and err.count("\n") == 1 and message in err
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_folder_or_with_a_used_one_is_refused(monkeypatch, capsys, config):
    assert run(monkeypatch, capsys, "pretrain", config)[0] == 0
    status, _, err = run(monkeypatch, capsys, "pretrain", config)
    assert status == 2 and "already holds a run" in err
    config.write_text("\n".join(line for line in config.read_text().splitlines() if "output_dir" not in line))
    status, _, err = run(monkeypatch, capsys, "pretrain", config)
    assert status == 2 and "[pretrain] output_dir is missing" in err


def test_another_mixed_precision_by_a_launcher_is_refused_before_a_model_is_read(monkeypatch, capsys, config):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    status, _, err = run(monkeypatch, capsys, "pretrain", config, "--teacher.path", "missing/folder/here")
    assert status == 2 and 'set mixed_precision="bf16" in the settings of pretrain' in err


def test_a_model_saved_as_another_kind_is_refused(monkeypatch, capsys, config, tmp_path):
    sparse_model().save_pretrained(tmp_path / "sparse")
    arguments = ("--sparse.path", tmp_path / "teacher", "--sparse.d_model", "16")
    status, _, err = run(monkeypatch, capsys, "pretrain", config, *arguments)
    assert status == 2 and "[sparse] block_size=12 is unknown" in err
