"""Attention with a sink, the largest weights of a matrix, float32 products: python benchmarks/bench_kernels.py

Milliseconds on one thread, and in brackets the speed relative to the first column.
"""

import torch
from timing import header, medians, row
from torch.nn import functional as F

from bridges.ops.abs_topk import abs_topk_mask
from bridges.ops.causal_attention import causal_attention, causal_attention_eager


def attention(batch, heads, seq, d_head):
    """Forward and backward, by the matrix of weights and by the fused kernel."""
    q, k, v = (torch.randn(batch, heads, seq, d_head, requires_grad=True) for _ in range(3))
    sink = torch.randn(heads, requires_grad=True)
    return {
        name: lambda f=function: torch.autograd.grad(f(q, k, v, sink).sum(), (q, k, v, sink))
        for name, function in (("by its definition", causal_attention_eager), ("causal_attention", causal_attention))
    }


def largest(shape, density):
    """The mask of the largest entries of a matrix."""
    weight = torch.randn(shape).flatten()
    count = round(density * weight.numel())

    def by_topk():
        mask = torch.zeros_like(weight, dtype=torch.bool)
        mask[weight.abs().topk(count, sorted=False).indices] = True

    return {"torch.topk": by_topk, "abs_topk_mask": lambda: abs_topk_mask(weight, count)}


def products(tokens, n_in, n_out):
    """One linear map at each of torch's precisions."""
    x, weight = torch.randn(tokens, n_in), torch.randn(n_out, n_in)

    def at(precision):
        torch.set_float32_matmul_precision(precision)
        F.linear(x, weight)
        torch.set_float32_matmul_precision("highest")

    return {precision: lambda p=precision: at(p) for precision in ("highest", "high", "medium")}


def main():
    torch.set_num_threads(1)
    tables = {
        "batch x heads x seq x d_head": {
            "8 x 32 x 128 x 16": attention(8, 32, 128, 16),
            "2 x 32 x 1024 x 16": attention(2, 32, 1024, 16),
        },
        "largest of 2048 x 8192": {f"1/{n}": largest((2048, 8192), 1 / n) for n in (1000, 256, 64, 10)},
        "tokens x in x out": {
            "1024 x 512 x 2048": products(1024, 512, 2048),
            "1024 x 2048 x 2048": products(1024, 2048, 2048),
        },
    }
    for what, rows in tables.items():
        print(header(what, next(iter(rows.values()))))
        for label, candidates in rows.items():
            print(row(label, medians(candidates, rounds=10)), flush=True)
        print()


if __name__ == "__main__":
    main()
