"""One training step against a written-out one (written_out.py): time, peak memory. python benchmarks/bench_step.py

Each row is one run in which both steps alternate: the processor time of the fastest of --rounds steps, and the ratio.
Peak memory is that of a process of its own for each, over what it held before its first step. All sites, exact KL, 8
rows of 128 tokens (two for memory), one thread. The smaller cases alone with --quick.
"""

import argparse
import ctypes
import multiprocessing
import time
from pathlib import Path

import torch
from step_pair import KINDS, models, steps

LARGE = {"layers": 2, "d_sparse": 2048, "density": 1 / 256}
TIMED = [(kind, {"layers": layers, "density": 1 / 64}) for layers in (2, 4) for kind in KINDS] + [("frozen", LARGE)]
MEASURED_ROWS = 2
"""Rows of a step whose memory is measured: the graphs of all hybrid passes of 16 layers must fit."""
MEASURED = [("fixed support", {"layers": layers, "density": 1 / 64}) for layers in (4, 16)]


def fastest(kind, shape, rounds):
    """{name: milliseconds of processor time of the fastest step}."""
    dense, sparse = models(**shape)
    with steps(dense, sparse, shape["density"], kind) as functions:
        times = {name: [] for name in functions}
        for _ in range(rounds + 1):  # the first one compiles
            for name, step in functions.items():
                started = time.process_time()
                step()
                times[name].append(1e3 * (time.process_time() - started))
    return {name: min(taken[1:]) for name, taken in times.items()}


def status_mib(field):
    """An entry of this process's /proc/self/status, MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak_mib(name, kind, shape):
    """MiB that two steps take at their peak over what the process held before; call it in a process of its own."""
    torch.set_num_threads(1)
    small = {**shape, "layers": 1, "d_dense": 32, "d_sparse": 256, "vocab": 64}
    for batch, case in ((1, small), (MEASURED_ROWS, shape)):  # the small one compiles
        with steps(*models(**case), shape["density"], kind, batch=batch) as functions:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free counts as taken otherwise
            before = status_mib("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            for _ in range(2):
                functions[name]()
            taken = status_mib("VmHWM") - before
    return taken


def describe(kind, shape):
    """A case in words."""
    return (
        f"{kind}, {shape['layers']} layers, d_sparse {shape.get('d_sparse', 512)}, density 1/{1 / shape['density']:.0f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two layers, no memory")
    parser.add_argument("--memory", action="store_true", help="memory alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.memory:
        print("| one step, processor ms | written out | ours | ratio |\n|---|---|---|---|")
    for kind, shape in TIMED if not arguments.memory else ():
        if arguments.quick and shape != {"layers": 2, "density": 1 / 64}:
            continue
        took = fastest(kind, shape, arguments.rounds)
        written, ours = took["written out"], took["ours"]
        print(f"| {describe(kind, shape)} | {written:.0f} | {ours:.0f} | {written / ours:.2f} |", flush=True)
    if arguments.quick:
        return
    print("\n| peak memory of a step, MiB | written out | ours | ratio |\n|---|---|---|---|")
    for kind, shape in MEASURED:
        found = []
        for name in ("written out", "ours"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(peak_mib, (name, kind, shape)))
        print(f"| {describe(kind, shape)} | {found[0]:.0f} | {found[1]:.0f} | {found[0] / found[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
