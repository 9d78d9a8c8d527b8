"""`sparse_linear` against the dense product, forward and with backward: python benchmarks/bench_sparse_linear.py"""

import torch
from timing import header, medians, row
from torch.nn import functional as F

from bridges.ops.sparse_linear import NonzeroPattern, sparse_linear

TOKENS = 1024


def measure(n_in: int, n_out: int, density: float) -> dict[str, float]:
    """Median milliseconds of each candidate on a random matrix of this density."""
    mask = torch.rand(n_out, n_in) < density
    weight = (torch.randn(n_out, n_in) * mask).requires_grad_()
    pattern = NonzeroPattern.from_mask(mask)
    values = weight.detach().flatten()[pattern.flat].requires_grad_()
    x, grad = torch.randn(TOKENS, n_in, requires_grad=True), torch.randn(TOKENS, n_out)
    candidates = {
        "dense forward": lambda: F.linear(x, weight),
        "nonzeros forward": lambda: sparse_linear(x, values, pattern),
        "dense both ways": lambda: F.linear(x, weight).backward(grad),
        "nonzeros both ways": lambda: sparse_linear(x, values, pattern).backward(grad),
    }
    return medians(candidates, rounds=7)


def main() -> None:
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, {TOKENS} tokens, float32")
    sizes = [(width, width, density) for width in (512, 1024, 2048) for density in (0.1, 0.05, 0.0125)]
    for i, (n_in, n_out, density) in enumerate(sizes):
        taken = measure(n_in, n_out, density)
        if i == 0:
            print(header("in x out, density, ms", taken))
        print(row(f"{n_in} x {n_out}, {density}", taken))


if __name__ == "__main__":
    main()
