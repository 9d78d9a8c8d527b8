"""Runs on several processes one after the other, some of which are stopped or lose a process.

rank_runs.py RUNS: a JSON list of runs, each an object with

    verb        fit or pretrain
    processes   how many
    settings    of the verb, with output_dir
    event       optional: [what, rank, step], what happens to a process in a step: interrupt, kill, stop, raise
                or linger
    watch       optional: intervals of the watch over processes, by name

It prints the seconds and the exit codes of every run as JSON. Processes are forks, with everything imported already.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from pairs import gpt2, sparse_model
from separate_runs import padded_data

from bridges.fit import fit
from bridges.fitting import watch
from bridges.fitting.trainer import Trainer
from bridges.pretrain import pretrain
from bridges.sparsity.pretraining import Pretrainer


def happen(what):
    """Let something happen to this process."""
    if what == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    elif what == "kill":
        os._exit(9)
    elif what == "stop":  # it lives, but neither answers nor closes a connection
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        raise OSError("the disk is full")


def install(trainer, what, at_rank, at_step):
    """Let something happen to a process at the start of a step."""
    step = trainer.train_step

    def patched(self, batches):
        if self.step + 1 == at_step and self.processes.rank == at_rank:
            happen(what)
        return step(self, batches)

    trainer.train_step = patched


def run_one(verb, settings):
    """The verb on this process; what each process has in the end goes to a file of its own."""
    rank, settings = os.environ["RANK"], {"progress": False, **settings}
    dense, sparse = gpt2(layers=1), sparse_model(layers=1)
    if verb == "fit":
        tensors = fit(dense, sparse, padded_data(), **settings).tensors()
    else:
        tensors = dict(pretrain(sparse, padded_data(), teacher=dense, **settings).named_parameters())
    torch.save({name: t.detach() for name, t in tensors.items()}, f"{settings['output_dir']}/rank-{rank}.pt")


def process(rank, run, shared):
    """One process of a run; its exit code."""
    os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    for name, seconds in run.get("watch", {}).items():
        setattr(watch, name, seconds)
    event = run.get("event")
    if event:
        install(Trainer if run["verb"] == "fit" else Pretrainer, *event)
    try:
        run_one(run["verb"], run["settings"])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        if event and event[0] == "linger" and rank == event[1]:
            time.sleep(600)  # a program that catches the error and goes on with something else
        return 1
    return 0


def outcome(run):
    """Start the processes of a run, and wait for them; one that lingers or is stopped is killed after the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(run["processes"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started, children = time.monotonic(), []
    for rank in range(run["processes"]):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = process(rank, run, shared)
            finally:
                os._exit(code)
        children.append(child)
    event = run.get("event")
    lingering = children.pop(event[1]) if event and event[0] in ("linger", "stop") else None
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    seconds = time.monotonic() - started
    if lingering is not None:
        os.kill(lingering, signal.SIGKILL)
        os.waitpid(lingering, 0)
    return seconds, codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = []
    for one in json.loads(sys.argv[1]):
        Path(one["settings"]["output_dir"]).mkdir(parents=True, exist_ok=True)
        print(f"run {len(found)}", file=sys.stderr, flush=True)
        found.append(outcome(one))
    print(json.dumps(found))
