"""AbsTopK of 1024 rows, k = d/4, float32: forward, with backward, and at a few channels alone.

`python benchmarks/bench_abs_topk.py`
"""

from collections.abc import Callable

import torch
from timing import header, medians, row
from torch import Tensor

from bridges.ops.abs_topk import FEW, abs_topk, abs_topk_at, abs_topk_eager


def topk_and_scatter(x: Tensor, k: int) -> Tensor:
    """What one writes first; not the contract, since torch.topk breaks ties as it likes."""
    kept = x.abs().topk(k, sorted=False).indices
    return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))


WAYS = {"torch.topk + scatter": topk_and_scatter, "eager twin": abs_topk_eager, "abs_topk": abs_topk}


def forward(way: Callable[[Tensor, int], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: way(x.detach(), x.shape[-1] // 4)


def both(way: Callable[[Tensor, int], Tensor], x: Tensor) -> Callable[[], object]:
    upstream = torch.randn_like(x)
    return lambda: torch.autograd.grad(way(x, x.shape[-1] // 4), x, upstream)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(header("d, ms", list(WAYS)))
    for d in (512, 2048, 8192):
        x = torch.randn(1024, d, requires_grad=True)
        for name, build in (("forward", forward), ("and backward", both)):
            print(row(f"{d} {name}", medians({way: build(WAYS[way], x) for way in WAYS}, rounds=7)))
    print(header("d, ms", ["all channels", "one", f"{FEW}"]))
    for d in (512, 2048, 8192):
        x = torch.randn(1024, d)
        ways = {"all": lambda x=x, k=d // 4: abs_topk(x, k)}
        ways |= {str(n): lambda x=x, k=d // 4, n=n: abs_topk_at(x, k, range(n)) for n in (1, FEW)}
        print(row(f"{d}", medians(ways, rounds=7)))


if __name__ == "__main__":
    main()
