"""Where the time of one training step goes, by kind of operation: python benchmarks/profile_step.py

The pair of `step_pair.py`, all sites, exact KL, on the CPU or, with --device cuda, on a GPU.
"""

import argparse
from collections import defaultdict

from step_pair import KINDS, models, steps
from torch.profiler import ProfilerActivity, profile, record_function

from bridges.ops import kernels

PARTS = {
    "dense products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::dot", "aten::mv"),
    "products with nonzeros": ("_SparseLinear", "_DenseGradientLinear"),
    "fused attention": ("attention",),
    "AbsTopK": ("_ApplyMask", "topk"),
    "softmax, KL": ("softmax", "_KLDivergence", "logsumexp"),
    "zeros and copies": ("fill_", "copy_", "aten::cat", "index", "aten::where", "masked", "aten::empty", "nonzero"),
    "optimisers": ("Optimizer", "_foreach", "_fused_adam", "aten::lerp", "addcmul", "addcdiv"),
}
"""What the names of operations contain; the first part that fits counts. The rest is elementwise arithmetic."""


def part_of(name: str) -> str:
    """The part that an operation counts to."""
    for part, names in PARTS.items():
        if any(one.lower() in name.lower() for one in names):
            return part
    return "elementwise and other"


def record_kernels() -> None:
    """Give the compiled kernels of AbsTopK, which are no torch operations, an entry in the profile."""
    for name in ("topk_mask", "topk_mask_long"):
        setattr(kernels, name, recorded(name, getattr(kernels, name)))


def recorded(name, kernel):
    """The kernel, with its name in the profile."""

    def run(*args):
        with record_function(name):
            kernel(*args)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--kind", choices=KINDS, default="fixed support")
    parser.add_argument("--d-sparse", type=int, default=512)
    parser.add_argument("--density", type=float, default=1 / 64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    dense, sparse = models(arguments.layers, d_sparse=arguments.d_sparse, density=arguments.density)
    dense, sparse = dense.to(arguments.device), sparse.to(arguments.device)
    on_gpu = arguments.device != "cpu"
    if not on_gpu:
        record_kernels()
    with steps(dense, sparse, arguments.density, arguments.kind) as functions:
        step = functions["ours"]
        step()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
            for _ in range(arguments.steps):
                step()
    times, calls = defaultdict(float), defaultdict(int)
    for event in profiler.key_averages():
        part = part_of(event.key)
        times[part] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / arguments.steps / 1e3
        calls[part] += event.count // arguments.steps
    total = sum(times.values())
    print(f"{arguments.kind}, {arguments.layers} layers, {arguments.device}: {total:.0f} ms a step\n")
    print("| part | ms | share | calls |\n|---|---|---|---|")
    for part, ms in sorted(times.items(), key=lambda item: -item[1]):
        print(f"| {part} | {ms:.0f} | {ms / total:.0%} | {calls[part]} |")


if __name__ == "__main__":
    main()
