"""Where the time of one training step goes, by part and by kind of operation: python benchmarks/profile_step.py

The pair of `step_pair.py`, all sites, exact KL, on the CPU or, with --device cuda, on a GPU. On a CPU times are those
of operations, and of Python between them; on a GPU those of kernels, copies and fills, whoever waits for them.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from measure_step import Case, milliseconds, on_gpu
from step_pair import KINDS, WITH_A_MOVE, models, steps
from step_parts import PARTS, Spent, recorded_parts, time_spent
from torch.profiler import ProfilerActivity, profile

PYTHON, OTHER = "Python between operations", "elementwise and other"
NAMES = {
    "fused attention": ("attention", "fmha", "flash"),
    "AbsTopK": ("_ApplyMask", "topk", "_select_row", "_copy_masked", "_count_digits", "_choose_digit", "_count_ties",
                "_write_mask"),
    "products with nonzeros": ("_SparseLinear", "_DenseGradientLinear"),
    "dense products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::dot", "aten::mv", "gemm", "gemv", "nvjet",
                       "splitK"),
    "softmax, KL": ("softmax", "_KLDivergence", "logsumexp", "_kl_row"),
    "optimisers": ("Optimizer", "_foreach", "_fused_adam", "aten::lerp", "addcmul", "addcdiv", "multi_tensor_apply"),
    "zeros and copies": ("fill", "copy_", "memcpy", "memset", "aten::cat", "CatArray", "index", "aten::where", "masked",
                         "aten::empty", "nonzero"),
}  # fmt: skip
"""What the names of torch's operations, of kernels of this library and of CUDA's libraries contain; the first kind that
fits counts. The rest is elementwise arithmetic."""


class Profile(NamedTuple):
    """Of some steps in a row."""

    spent: list[Spent]
    """By the steps together."""
    steps: int
    clock: float
    """Milliseconds of the fastest step, without the profiler: processor time, on a GPU until it has finished."""

    def by(self, key: Callable[[Spent], str]) -> dict[str, tuple[float, int]]:
        """Milliseconds and calls of a step, by a key of what was spent."""
        times, calls = defaultdict(float), defaultdict(int)
        for one in self.spent:
            times[key(one)] += one.microseconds / self.steps / 1e3
            calls[key(one)] += 1
        return {name: (ms, calls[name] // self.steps) for name, ms in times.items()}


def kind_of(name: str) -> str:
    """The kind of operation that a name counts to."""
    if not name:
        return PYTHON
    return next((kind for kind, of in NAMES.items() if any(one.lower() in name.lower() for one in of)), OTHER)


def profile_steps(case: Case, n_steps: int, device: str = "cpu", name: str = "ours") -> Profile:
    """Profile a function of `steps` after a warm-up, and time it without the profiler."""
    gpu = on_gpu(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    pair = models(**case.shape, seq=case.seq, device=device)
    with steps(*pair, case.shape["density"], case.kind, batch=case.batch, seq=case.seq, **case.settings) as functions:
        functions["ours"]()
        functions[name]()
        clock = min(milliseconds(functions[name], device) for _ in range(n_steps))
        with recorded_parts(), profile(activities=activities) as profiler:
            for _ in range(n_steps):
                functions[name]()
    return Profile(time_spent(profiler.events() or [], gpu), n_steps, clock)


def print_tables(found: Profile) -> None:
    """Milliseconds and shares of a step: by part, in the order of a step; by kind of operation, the largest first."""
    parts, kinds = found.by(lambda one: one.part), found.by(lambda one: kind_of(one.name))
    total = sum(ms for ms, _ in parts.values())
    for what, rows in {
        "part of a step": [(part, *parts[part]) for part in PARTS if part in parts],
        "kind of operation": sorted(((kind, *of) for kind, of in kinds.items()), key=lambda row: -row[1]),
    }.items():
        print(f"\n| {what} | ms | share | calls |\n|---|---|---|---|")
        for name, ms, calls in rows:
            print(f"| {name} | {ms:.0f} | {ms / total:.0%} | {calls} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--kind", choices=KINDS, default="fixed support")
    parser.add_argument("--d-sparse", type=int, default=512)
    parser.add_argument("--density", type=float, default=1 / 64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--moves", action="store_true", help="steps that end in a move, of a moving support")
    args = parser.parse_args(arguments)
    if args.moves and args.kind != "moving support":
        parser.error(f"--moves needs --kind 'moving support', not {args.kind!r}")
    case = Case(args.kind, {"layers": args.layers, "d_sparse": args.d_sparse, "density": args.density})
    found = profile_steps(case, args.steps, args.device, WITH_A_MOVE if args.moves else "ours")
    total = sum(one.microseconds for one in found.spent) / args.steps / 1e3
    what = "kernels of a step" if on_gpu(args.device) else "a step under the profiler"
    moves = ", steps with a move" if args.moves else ""
    print(f"{case}{moves}, {args.device}: {what} {total:.0f} ms; a step without the profiler {found.clock:.0f} ms")
    print_tables(found)


if __name__ == "__main__":
    main()
