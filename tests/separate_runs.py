"""Fits in processes of their own, for tests that kill them or run two at once.

separate_runs.py fit OUT SETTINGS          one process of a fit (torchrun's variables say which one)
separate_runs.py killed OUT SETTINGS SEED  a fit killed at five random moments and resumed until done
separate_runs.py pretrain OUT SETTINGS     a pretraining on one process, on two, and on two that end by Ctrl-C, resumed
"""

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from pairs import gpt2, sparse_model, tokens

from bridges.fit import fit
from bridges.fitting.trainer import Trainer
from bridges.pretrain import pretrain
from bridges.sparsity.pretraining import Pretrainer

KILLS = 5
INTERRUPTED = 5
"""The step in which a pretraining on two processes gets Ctrl-C."""


def padded_data():
    """Some rows are padded, so that processes have different numbers of tokens."""
    ids = tokens(40, 10, seed=31)
    mask = torch.ones_like(ids)
    mask[::3, :4] = 0
    mask[1::5, 6:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(4), mask.split(4), strict=True)]


def run(out, settings, resume=False):
    dense, sparse = gpt2(layers=1), sparse_model(layers=1)
    settings = dict(settings)
    eval_data = tokens(4, 10, seed=settings.pop("eval_seed")) if "eval_seed" in settings else None
    fit(dense, sparse, padded_data(), eval_data=eval_data, output_dir=out, resume=resume, progress=False, **settings)


def run_pretrain(out, settings):
    data, teacher = padded_data(), gpt2(layers=1)
    pretrain(sparse_model(layers=1), data, teacher=teacher, output_dir=out, progress=False, **settings)


def interrupted_pretrain(out, settings):
    """A run in which the last process alone gets Ctrl-C, and that ends on every process."""
    step = Pretrainer.train_step

    def stopping(self, batches):
        if self.step + 1 == INTERRUPTED and self.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batches)

    Pretrainer.train_step = stopping
    try:
        run_pretrain(out, settings)
    except KeyboardInterrupt:
        return
    raise AssertionError("the run was not interrupted")


def together(n_processes, function, *arguments):
    """Run a function on several processes, forks that have everything imported already, and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(n_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(n_processes):
        child, failed = os.fork(), True
        if child == 0:
            try:
                os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
                function(*arguments)
                failed = False
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(failed)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * n_processes


def pretrain_each_way(out, settings):
    """Three runs of one global batch: on one process, on two, and on two that were interrupted and resumed."""
    halved = {**settings, "batch_size": settings["batch_size"] // 2}
    together(1, run_pretrain, out / "one", settings)
    together(2, run_pretrain, out / "two", halved)
    together(2, interrupted_pretrain, out / "resumed", halved)
    assert not (out / "resumed/sparse").exists(), "an interrupted run leaves no result"
    together(2, run_pretrain, out / "resumed", {**halved, "resume": True})


def logged(out, settings):
    """A run that appends the number of every step to a file as it is done."""
    step = Trainer.train_step

    def noted(self, batches):
        losses = step(self, batches)
        with (Path(out) / "executed").open("a") as log:
            log.write(f"{self.step}\n")
        return losses

    Trainer.train_step = noted
    run(out, settings, resume=True)


def attempt(out, settings):
    """The process id of a run in a fork, which has everything imported already."""
    child = os.fork()
    if child == 0:
        logged(out, settings)
        os._exit(0)
    return child


def last_step(log):
    return max(map(int, log.read_text().replace("killed", "0").split()), default=0)


def killed(out, settings, seed):
    chance, log = random.Random(seed), Path(out) / "executed"
    Path(out).mkdir()
    log.touch()
    for kill in range(KILLS):
        # In the kill-th part of the run, at any instant: within a step, a row of metrics, a checkpoint.
        target = settings["steps"] * (kill + chance.random()) / KILLS
        child = attempt(out, settings)
        while last_step(log) < target:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before it was killed"
            time.sleep(0.001)
        time.sleep(chance.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with log.open("a") as file:
            file.write("killed\n")
    assert os.waitstatus_to_exitcode(os.waitpid(attempt(out, settings), 0)[1]) == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, out, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if what == "killed":
        killed(out, settings, int(sys.argv[4]))
    elif what == "pretrain":
        pretrain_each_way(Path(out), settings)
    else:
        run(out, settings)
