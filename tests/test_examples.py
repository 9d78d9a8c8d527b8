"""Every example runs, at tiny settings."""

import subprocess
import sys
from pathlib import Path

import pytest

import bridges

ROOT = Path(__file__).parents[1]
TINY_DENSE = "--split heldout --batch-size 4 --seq-len 16 --width 8 --heads 2 --warmup 2 --steps 6"
TINY_FIT = "--split heldout --rows 64 --steps 3 --batch_size 2 --eval_tokens 256 --progress false"


def run(script, *arguments):
    """What the example printed."""
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_examples_are_short():
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 80, path.name


@pytest.mark.slow
def test_fit_two_models(tmp_path):
    assert "kl_sparse_to_dense" in run("fit_two_models.py", "--steps", 3, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "bridges.safetensors").is_file()


@pytest.mark.slow
def test_train_dense_in_two_legs_is_one_run(tmp_path):
    for name, legs in (("once", [0]), ("twice", [3, 3])):
        for leg in legs:
            folders = ("--out", tmp_path / name, "--run", tmp_path / f"{name}_run")
            run("train_dense.py", *TINY_DENSE.split(), "--leg-steps", leg, *folders)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "twice")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_train_tokenizer_and_sparse(tmp_path):
    run("train_tokenizer.py", "--split", "heldout", "--out", tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    out = run("train_sparse.py", "--run", tmp_path / "pair", *TINY_FIT.split())
    assert "nmse_decode" in out
    assert (tmp_path / "pair" / "sparse" / "sparse_model.safetensors").is_file()


@pytest.mark.slow
def test_pretrain_sparse_with_fewer_nodes(tmp_path):
    config = tmp_path / "fewer.toml"
    config.write_text(
        "[nodes]\nafrac = 0.03125\nafrac_by_location = {attn_q = 0.25}\n[pretrain]\nsteps = 2\nbatch_size = 2\n"
    )
    run("pretrain_sparse.py", "--config", config, "--run", tmp_path / "run", "--split", "heldout", "--seq_len", 32)
    trained = bridges.SparseTransformer.from_pretrained(tmp_path / "run" / "sparse").config
    assert (trained.kept("mlp_out"), trained.kept("attn_q"), trained.kept("attn_k")) == (64, 128, 16)


@pytest.fixture(scope="module")
def bundled_bridges(tmp_path_factory):
    """A folder of the bundled bridges."""
    folder = tmp_path_factory.mktemp("bundled")
    bridges.load_bridges().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_steering_examples(bundled_bridges, tmp_path):
    out = run("steer_by_counterfactual.py", bundled_bridges)
    p = [float(line.rsplit("= ", 1)[1]) for line in out.splitlines() if line.startswith("strength")]
    assert len(p) == 5 and p[-1] > 0.2 > p[0]
    lines = run("steer_in_generation.py", bundled_bridges, "--tokens", 6).splitlines()
    assert len(lines) == 3 and lines[0].startswith("unedited:")
    arguments = ("--task", "for_while", "--most", 2, "--prompts", 10, "--save", tmp_path / "edit")
    out = run("find_the_channel.py", bundled_bridges, *arguments)
    assert "rank correlation" in out and "random directions of the same norm" in out
    assert (tmp_path / "edit.safetensors").is_file() and len(bridges.load_edits(tmp_path / "edit.json")) <= 2
