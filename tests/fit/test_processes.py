import json
import socket

import pytest
import torch
from fits import DATA, SPARSE, files, rows, shallow
from pairs import join, relative, sparse_model
from several_processes import finished, separately

from bridges.bridge import BridgeSet
from bridges.evaluate import measure
from bridges.fitting.closed_form import measure_read_scales, solve_bridges
from bridges.models.sparse.model import SparseTransformer


def two_processes(out, *settings):
    """Start one fit on two processes, each with its own settings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    ranks = (("0", settings[0]), ("1", settings[-1]))
    return [separately("fit", out, json.dumps(own), RANK=rank, LOCAL_RANK=rank, **shared) for rank, own in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True])
def test_a_run_killed_five_times_ends_with_the_bytes_of_one_never_killed(tmp_path, joint):
    """It repeats no step that a checkpoint holds."""
    steps, every = 250, 10
    settings = {
        "steps": steps,
        "checkpoint_every": every,
        "batch_size": 2,
        "eval_every": 100,
        "closed_form_tokens": 200,
    }
    settings |= SPARSE if joint else {}
    finished(
        separately("killed", tmp_path / "killed", json.dumps(settings), 7 + joint),
        separately("fit", tmp_path / "whole", json.dumps(settings)),
    )
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(1, steps + 1))

    attempts = (tmp_path / "killed/executed").read_text().split("killed\n")
    assert len(attempts) == 6
    done = 0
    for executed in (list(map(int, attempt.split())) for attempt in attempts):
        if executed:
            assert executed == list(range(executed[0], executed[-1] + 1))
            assert executed[0] % every == 1 and done - executed[0] < every
            done = executed[-1]
    assert done == steps


MOVING = {**SPARSE, "support": "moving", "start_density": 0.6, "move_every": 2, "path_weight": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("training", [{}, SPARSE, MOVING], ids=["frozen", "projected", "moving"])
def test_two_processes_are_one_with_the_doubled_batch(tmp_path, training):
    settings = {"steps": 5, "gradient_accumulation_steps": 2, "closed_form_tokens": 200, "lr": 1e-2, "eval_every": 2}
    settings |= training
    finished(
        separately("fit", tmp_path / "one", json.dumps({**settings, "batch_size": 4})),
        *two_processes(tmp_path / "two", {**settings, "batch_size": 2}),
    )
    one, two = (BridgeSet.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for name, tensor in one.tensors().items():
        assert relative(two.tensors()[name], tensor) < 1e-8, name
    for name, value in one.report.flat().items():
        assert two.report.flat()[name] == pytest.approx(value, rel=1e-8), name
    assert [row["train/loss"] for row in two.history] == pytest.approx([r["train/loss"] for r in one.history], rel=1e-8)
    assert len(rows(tmp_path / "two")) == 5 and one.report.tokens == two.report.tokens
    if training:
        trained = (SparseTransformer.from_pretrained(tmp_path / name / "sparse") for name in ("one", "two"))
        for p, q in zip(*(model.parameters() for model in trained), strict=True):
            assert relative(p.detach(), q.detach()) < 1e-8 or (p - q).abs().max() < 1e-12


@pytest.mark.slow
def test_processes_with_different_held_out_rows_are_both_refused(tmp_path):
    settings = {"steps": 1, "batch_size": 2, "closed_form_tokens": 100}
    for process in two_processes(tmp_path / "run", {**settings, "eval_seed": 1}, {**settings, "eval_seed": 2}):
        _, errors = process.communicate(timeout=300)
        assert process.returncode != 0 and "ValueError: data differs between processes" in errors


class WithoutRows:
    """The sums of two processes one after the other: the first has all rows, the second none.

    The second adds zeros to every sum and receives the first one's.
    """

    def __init__(self):
        self.totals = []

    def first(self, tensor):
        self.totals.append(tensor.clone())
        return tensor

    def second(self, tensor):
        total = self.totals.pop(0)
        assert tensor.shape == total.shape and tensor.dtype == total.dtype and not tensor.any()
        return total.clone()


def test_a_process_without_rows_has_the_closed_form_of_the_others():
    batches, sums = [(ids, None) for ids in DATA.split(5)], WithoutRows()
    whole, empty = (join(shallow(), shallow(sparse_model)) for _ in range(2))
    solve_bridges(whole, batches, 1e-4, 1e9, sums.first)
    solve_bridges(empty, [], 1e-4, 1e9, sums.second)
    assert not sums.totals
    assert all(map(torch.equal, whole.bridge_set.parameters(), empty.bridge_set.parameters()))


def test_a_process_without_rows_has_the_figures_of_the_others():
    batches, sums = [(ids, None) for ids in DATA.split(5)], WithoutRows()
    pair = join(shallow(), shallow(sparse_model))
    whole = measure(pair, batches, sums.first)
    assert measure(pair, [], sums.second) == whole and not sums.totals
    measure_read_scales(pair, batches, sums.first)
    expected = {name: tensor.clone() for name, tensor in pair.bridge_set.tensors().items()}
    measure_read_scales(pair, [], sums.second)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pair.bridge_set.tensors().items())
