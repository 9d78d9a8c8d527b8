"""fit() and pretrain() on four processes: the result of one, resumed on other numbers, and ended when one dies."""

import json
import os
import subprocess
import sys

import pytest
import torch
from fits import rows
from pairs import relative
from several_processes import TESTS

STEPS = 5
FIT = {"steps": STEPS, "closed_form_tokens": 200, "lr": 1e-2, "checkpoint_every": 100}
JOINT = {**FIT, "train_sparse": True, "target_density": 0.5}
PRETRAIN = {"steps": STEPS, "lr": 1e-2, "move_every": 2, "log_every": 1, "checkpoint_every": 100}
PRETRAIN |= {"start_density": 0.6, "target_density": 0.3}
VERBS = {"fit": ("fit", FIT), "joint": ("fit", JOINT), "pretrain": ("pretrain", PRETRAIN)}
CLOCKS = ("tokens_per_second", "steps_per_second")


def started(runs):
    """Seconds and exit codes of every run, and what each printed on its standard error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    command = [sys.executable, str(TESTS / "rank_runs.py"), json.dumps(runs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    printed = [done.stderr.split(f"run {i}\n")[1].split("\nrun ")[0] for i in range(len(runs))]
    return [(seconds, codes, errors) for (seconds, codes), errors in zip(found, printed, strict=True)]


def a_run(kind, out, processes, batch_size, event=None, **settings):
    verb, base = VERBS[kind]
    settings = {**base, "batch_size": batch_size, "output_dir": str(out), **settings}
    return {"verb": verb, "processes": processes, "settings": settings, "event": event}


def assert_alike(one, other):
    """The tensors of two runs, and all that they have logged, up to float64 rounding."""
    tensors, others = (torch.load(folder / "rank-0.pt") for folder in (one, other))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert relative(others[name], tensor) < 1e-8 or (tensor - others[name]).abs().max() < 1e-12, name
    logged = [[{k: v for k, v in row.items() if k not in CLOCKS} for row in rows(folder)] for folder in (one, other)]
    assert [row["step"] for row in logged[0]] == [row["step"] for row in logged[1]] == list(range(1, STEPS + 1))
    for row, same_row in zip(*logged, strict=True):
        assert row.keys() == same_row.keys()
        assert list(same_row.values()) == pytest.approx(list(row.values()), rel=1e-8)


@pytest.mark.slow(40)
@pytest.mark.parametrize("kind", VERBS)
def test_four_processes_are_one_and_a_run_resumes_on_any_number_of_them(tmp_path, kind):
    """Started on two, stopped, continued on four, stopped, continued on one: no row is repeated or left out."""
    stopped = tmp_path / "stopped"
    runs = [
        a_run(kind, tmp_path / "one", 1, 4),
        a_run(kind, tmp_path / "four", 4, 1),
        a_run(kind, stopped, 2, 2, event=["interrupt", 1, 2]),
        a_run(kind, stopped, 4, 2, resume=True),
        a_run(kind, stopped, 4, 1, event=["interrupt", 3, 4], resume=True),
        a_run(kind, stopped, 1, 2, gradient_accumulation_steps=2, resume=True),
    ]
    found = started(runs)
    assert [codes for _, codes, _ in found] == [[0], [0] * 4, [1] * 2, [1] * 4, [1] * 4, [0]], found
    for run in (2, 4):
        assert "KeyboardInterrupt" in found[run][2]
    assert found[3][2].count("8 rows a step, but the run was started with 4") == 4
    assert "pass batch_size=1, or use another output_dir" in found[3][2]

    ranks = [torch.load(tmp_path / "four" / f"rank-{rank}.pt") for rank in range(4)]
    for other in ranks[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in ranks[0].items())
    assert_alike(tmp_path / "one", tmp_path / "four")
    assert_alike(tmp_path / "one", stopped)


DIED = "(counted from 0) has stopped responding: it was probably killed"
STORE_GONE = "process 0 of 3 (counted from 0) or the launcher, which holds the store of the run, has stopped responding"
FAILED = "process 1 of 3 (counted from 0) failed with OSError: the disk is full; the others cannot go on"
KILLED = (["kill", 2, 3], [1, 1, 9], f"process 2 of 3 {DIED}")
FIRST_KILLED = (["kill", 0, 3], [9, 1, 1], STORE_GONE)
RAISES = (["raise", 1, 3], [1, 1, 1], FAILED)
LINGERS = (["linger", 1, 3], [1, 1], FAILED)
STOPPED = (["stop", 2, 3], [1, 1], f"process 2 of 3 {DIED}")
FIRST_STOPPED = (["stop", 0, 3], [1, 1], STORE_GONE)


def assert_ends_with_a_message(tmp_path, kind, ways, **run):
    runs = [a_run(kind, tmp_path / str(i), 3, 1, event=event) | run for i, (event, _, _) in enumerate(ways)]
    for (seconds, codes, errors), (_, expected, message) in zip(started(runs), ways, strict=True):
        assert codes == expected and seconds < 90, errors
        assert errors.count(message) == 2 and "start all of them again" in errors, errors


@pytest.mark.slow(30)
@pytest.mark.parametrize(
    ("kind", "ways"), [("fit", [KILLED, FIRST_KILLED]), ("fit", [RAISES, LINGERS]), ("pretrain", [KILLED, LINGERS])]
)
def test_a_process_that_dies_ends_the_run_with_a_message_on_every_other(tmp_path, kind, ways):
    """Killed, failed, or failed and alive still, which would let the others wait for half an hour."""
    assert_ends_with_a_message(tmp_path, kind, ways)


@pytest.mark.slow(30)
def test_a_process_that_stops_without_closing_a_connection_ends_the_run_too(tmp_path):
    """No sum fails then, as with NCCL; calls of the store do not return where the stopped process holds it."""
    assert_ends_with_a_message(tmp_path, "fit", [STOPPED, FIRST_STOPPED], watch={"SILENT": 6.0, "GRACE": 2.0})
