"""`accelerate launch` as docs/scale.md and configs/ have it."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from fits import raiser, run, shallow
from pairs import gpt2, sparse_model

from bridges.bridge import BridgeSet

ROOT = Path(__file__).parents[2]
EIGHT_NODES = ROOT / "configs/accelerate_eight_nodes.yaml"


def test_another_mixed_precision_by_the_launcher_is_refused_before_anything_is_computed_or_written(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(import_module("bridges.fit"), "ProcessGroup", raiser(AssertionError("the run began")))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match=r"ACCELERATE_MIXED_PRECISION='bf16'.* mixed_precision='no' of fit"):
        run(output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launched", ["no", "bf16"])
def test_a_fit_in_the_launchers_precision_or_where_it_names_none_is_in_that_of_the_setting(launched, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    dense, seen = shallow(dtype=torch.float32), set()
    dense.transformer.h[0].mlp.c_fc.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    run(dense=dense, sparse=shallow(sparse_model, dtype=torch.float32), steps=1, mixed_precision="bf16")
    assert torch.bfloat16 in seen


def test_the_configuration_for_eight_nodes_is_one_of_accelerates():
    config = load_config_from_file(str(EIGHT_NODES))
    assert isinstance(config, ClusterConfig)
    assert (config.num_processes, config.num_machines) == (64, 8)
    assert config.distributed_type == "MULTI_GPU" and config.same_network and not config.use_cpu
    assert config.mixed_precision is None, "it is a setting of the run"


def test_a_wrong_key_in_a_configuration_is_refused(tmp_path):
    (tmp_path / "wrong.yaml").write_text(EIGHT_NODES.read_text() + "num_nodes: 8\n")
    with pytest.raises(ValueError, match="num_nodes"):
        load_config_from_file(str(tmp_path / "wrong.yaml"))


def test_the_command_for_eight_nodes_is_one_of_accelerates():
    comment = " ".join(re.findall(r"^# +(.*?)\\?$", EIGHT_NODES.read_text(), re.MULTILINE))
    command = re.search(r"accelerate launch (.*? bridges fit run\.toml)", comment)
    assert command is not None
    arguments = command[1].replace("$RANK", "3").replace("$FIRST", "10.0.0.1").split()
    given = launch_command_parser().parse_args(arguments)
    assert (ROOT / given.config_file).samefile(EIGHT_NODES)
    assert (given.machine_rank, given.main_process_ip, given.no_python) == (3, "10.0.0.1", True)
    assert [given.training_script, *given.training_script_args] == ["bridges", "fit", "run.toml"]


@pytest.fixture
def folder(tmp_path):
    """A folder with two saved models and a run file of a tiny fit."""
    gpt2(layers=1, dtype=torch.float32).save_pretrained(tmp_path / "dense")
    sparse_model(layers=1, dtype=torch.float32).save_pretrained(tmp_path / "sparse")
    (tmp_path / "run.toml").write_text(
        '[dense]\npath = "dense"\n[sparse]\npath = "sparse"\n[fit]\nsteps = 2\nseq_len = 8\nsampled_rows = 16\n'
        'batch_size = 2\neval_tokens = 64\nclosed_form_tokens = 100\noutput_dir = "run"\nprogress = false\n'
    )
    return tmp_path


def on_two_processes(folder, options=""):
    """The command of docs/scale.md that runs on CPUs, on two processes and a free port."""
    line = re.search(
        r"^ACCELERATE_USE_CPU=true accelerate launch .*run\.toml", (ROOT / "docs/scale.md").read_text(), re.M
    )
    assert line is not None
    command = line[0].replace("--num_processes 4", "--num_processes 2")
    command = command.replace("accelerate launch", f"accelerate launch --main_process_port 0 {options}")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(folder / "home"),  # without the user's own configuration of accelerate
    }
    return subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )


@pytest.mark.slow(30)
def test_the_launchers_command_for_cpus_fits_on_two_processes(folder):
    ended = on_two_processes(folder)
    assert ended.returncode == 0, ended.stderr
    bridge_set = BridgeSet.from_pretrained(folder / "run")
    assert bridge_set.sites == ["0.attn", "0.mlp", "final"] and len(bridge_set.history) == 2
    state = (folder / "run/checkpoints/step-00000002/state.json").read_text()
    assert '"processes": 2' in state, state


@pytest.mark.slow(30)
def test_the_launchers_mixed_precision_ends_every_process_in_one_line(folder):
    ended = on_two_processes(folder, "--mixed_precision bf16")
    assert ended.returncode != 0 and not (folder / "run").exists()
    lines = [line for line in ended.stderr.splitlines() if line.startswith("bridges: ")]
    assert lines and all("ACCELERATE_MIXED_PRECISION='bf16'" in line for line in lines), ended.stderr
