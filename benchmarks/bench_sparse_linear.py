"""Multiplying nonzeros alone against the dense product, forward and both: python benchmarks/bench_sparse_linear.py"""

import torch
from timing import header, medians, row
from torch.nn import functional as F

from bridges.ops.sparse_linear import NonzeroPattern, sparse_linear

TOKENS = 1024


def problem(n_in: int, n_out: int, density: float):
    weight = torch.randn(n_out, n_in) * (torch.rand(n_out, n_in) < density)
    places = NonzeroPattern.from_mask(weight != 0)
    values = weight.flatten()[places.flat].requires_grad_()
    return torch.randn(TOKENS, n_in, requires_grad=True), weight.requires_grad_(), values, places


def main() -> None:
    torch.manual_seed(0)
    names = ["dense forward", "nonzeros forward", "dense both ways", "nonzeros both ways"]
    print(f"{torch.get_num_threads()} threads, {TOKENS} tokens, float32")
    print(header("in x out, density, ms", names))
    for n_in, n_out in ((512, 512), (1024, 1024), (2048, 2048)):
        for density in (0.1, 0.05, 0.0125):
            x, weight, values, places = problem(n_in, n_out, density)
            grad = torch.randn(TOKENS, n_out)
            taken = medians(
                {
                    "dense forward": lambda x=x, w=weight: F.linear(x, w),
                    "nonzeros forward": lambda x=x, v=values, p=places: sparse_linear(x, v, p),
                    "dense both ways": lambda x=x, w=weight, g=grad: F.linear(x, w).backward(g),
                    "nonzeros both ways": lambda x=x, v=values, p=places, g=grad: sparse_linear(x, v, p).backward(g),
                },
                rounds=7,
            )
            print(row(f"{n_in} x {n_out}, {density}", taken))


if __name__ == "__main__":
    main()
