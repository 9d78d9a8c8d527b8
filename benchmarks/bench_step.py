"""One training step against a written-out one (written_out.py): time, operations, peak memory.

    python benchmarks/bench_step.py [--quick] [--memory]
    python benchmarks/bench_step.py --device cuda [--gpt2]

Each row is one run in which both steps and one large dense product alternate: the fastest of --rounds steps, and the
ratio of tokens in the same time. All sites, exact KL, 8 rows of 128 tokens; on a CPU processor time on one thread,
float32. Where the support moves, one step in `move_every` (25) ends in a move: such a step is timed apart, and what it
takes beyond a usual one is added to it in that proportion.

GFLOP are those of a step's matrix products, two for every multiplication, attention by its whole square of scores;
AbsTopK, softmaxes, KLs, norms and optimisers count none. The ceiling is the rate of the large product in the same run,
on as many threads, in the dtype and at the float32 precision of the step; a lower precision may have a higher one
(bench_kernels.py). "Products at the ceiling / step" is the time that the step's products would take at that rate, over
the time of the step: 100 % is a step that does nothing but products of the most favourable shape. Products with
nonzeros are added in the last column; for them the rate of dense products is no bound that one could reach, since every
nonzero is fetched by its index.

Peak memory on a CPU is that of a process of its own for each step, over what it held before its first, of 2 rows. On a
GPU it is what is allocated over what was before, and a batch that does not fit is halved until it does
(nan: not even one row). --gpt2: a dense
model of GPT-2's size (12 layers of width 768, vocabulary 50,257), a sparse one of 12 layers of width 2,048 at a density
of 1/256, 32 rows of 256 tokens, bf16.
"""

import argparse
import ctypes
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import torch
from measure_step import Case, caption, cells, measure
from step_pair import KINDS, models, steps

SMALL = {"layers": 2, "d_sparse": 512, "density": 1 / 64}
DEEP = SMALL | {"layers": 4}
WIDE = SMALL | {"d_sparse": 2048, "density": 1 / 256}
QUICK = [Case(kind, SMALL) for kind in KINDS]
TIMED = [*QUICK, *(Case(kind, DEEP) for kind in KINDS), Case("frozen", WIDE)]
MEASURED_ROWS = 2
"""Rows of a step whose memory is measured: the graphs of all hybrid passes of 16 layers must fit."""
MEASURED = [Case("fixed support", SMALL | {"layers": layers}, MEASURED_ROWS) for layers in (4, 16)]
GPT2_SHAPE = {"layers": 12, "d_dense": 768, "d_head": 64, "vocab": 50_257, "d_sparse": 2048, "density": 1 / 256}
GPT2 = [Case(kind, GPT2_SHAPE, 32, 256, {"mixed_precision": "bf16"}) for kind in ("frozen", "fixed support")]


def status_mib(field):
    """An entry of this process's /proc/self/status, MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak_mib(name, case):
    """MiB that two steps take at their peak over what the process held before; call it in a process of its own."""
    torch.set_num_threads(1)
    small = {**case.shape, "layers": 1, "d_dense": 32, "d_sparse": 256, "vocab": 64}
    for shape, batch in ((small, 1), (case.shape, case.batch)):  # the small one compiles
        with steps(*models(**shape), shape["density"], case.kind, batch=batch) as functions:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free counts as taken otherwise
            before = status_mib("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            for _ in range(2):
                functions[name]()
            taken = status_mib("VmHWM") - before
    return taken


def table_of_times(cases: Sequence[Case], rounds: int, device: str) -> None:
    """Measure and print each case; all are of one dtype."""
    what = "one step" if device == "cpu" else "one step on the GPU"
    for i, case in enumerate(cases):
        found = {what: str(case), **cells(measure(case, rounds, device))}
        if i == 0:
            print(f"| {' | '.join(found)} |\n|{'---|' * len(found)}")
        print(f"| {' | '.join(found.values())} |", flush=True)
    print(f"\n{caption(cases, device)}", flush=True)


def table_of_memory(cases: Sequence[Case]) -> None:
    """Measure and print each case, either step in a process of its own."""
    print("| peak memory of a step, MiB | written out | ours | ratio |\n|---|---|---|---|")
    for case in cases:
        found = []
        for name in ("written out", "ours"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(peak_mib, (name, case)))
        print(f"| {case} | {found[0]:.0f} | {found[1]:.0f} | {found[0] / found[1]:.1f} |", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two layers, no memory")
    parser.add_argument("--memory", action="store_true", help="memory alone")
    parser.add_argument("--gpt2", action="store_true", help="the size of GPT-2 alone; for a GPU")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.memory:
        table_of_memory(MEASURED)
        return
    table_of_times(GPT2 if args.gpt2 else QUICK if args.quick else TIMED, args.rounds, args.device)
    if args.device == "cpu" and not (args.quick or args.gpt2):
        print()
        table_of_memory(MEASURED)


if __name__ == "__main__":
    main()
