"""AbsTopK of 1024 rows, k = d/4, float32: forward, with backward, and at a few channels alone.

`python benchmarks/bench_abs_topk.py [--device cuda]`
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from timing import header, medians, row
from torch import Tensor

from bridges.ops.abs_topk import MAX_COUNTED_CHANNELS, abs_topk, abs_topk_at, abs_topk_eager


def topk_and_scatter(x: Tensor, k: int) -> Tensor:
    """The obvious version; it does not keep the contract, since torch.topk fixes no order of ties."""
    kept = x.abs().topk(k, sorted=False).indices
    return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))


FUNCTIONS = {"torch.topk + scatter": topk_and_scatter, "eager twin": abs_topk_eager, "abs_topk": abs_topk}


def forward(function: Callable[[Tensor, int], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: function(x.detach(), x.shape[-1] // 4)


def forward_and_backward(function: Callable[[Tensor, int], Tensor], x: Tensor) -> Callable[[], object]:
    upstream = torch.randn_like(x)
    return lambda: torch.autograd.grad(function(x, x.shape[-1] // 4), x, upstream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(header("d, ms", list(FUNCTIONS)))
    for d in (512, 2048, 8192):
        x = torch.randn(1024, d, device=device, requires_grad=True)
        for name, build in (("forward", forward), ("and backward", forward_and_backward)):
            print(row(f"{d} {name}", medians({key: build(FUNCTIONS[key], x) for key in FUNCTIONS}, rounds=7)))
    print("\n" + header("d, ms", ["all channels", "1", f"{MAX_COUNTED_CHANNELS}"]))
    for d in (512, 2048, 8192):
        x = torch.randn(1024, d, device=device)
        candidates = {"all": partial(abs_topk, x, d // 4)}
        candidates |= {str(n): partial(abs_topk_at, x, d // 4, range(n)) for n in (1, MAX_COUNTED_CHANNELS)}
        print(row(f"{d}", medians(candidates, rounds=7)))


if __name__ == "__main__":
    main()
