"""The projection after each step, one core. `python benchmarks/bench_sparsity.py`."""

import torch
from timing import header, medians, row
from torch import Tensor

from bridges.models.sparse.model import SparseConfig, SparseTransformer
from bridges.ops.abs_topk import abs_topk_mask, abs_topk_mask_eager
from bridges.sparsity.projection import clip_to_rms, project, sparse_parameters


def topk_and_scatter(flat: Tensor, count: int) -> Tensor:
    return torch.zeros_like(flat, dtype=torch.bool).scatter(0, flat.abs().topk(count, sorted=False).indices, True)


WAYS = {"torch.topk + scatter": topk_and_scatter, "eager twin": abs_topk_mask_eager, "abs_topk_mask": abs_topk_mask}


def one_tensor(entries: int) -> None:
    flat = 0.02 * torch.randn(entries)
    count = entries // 50
    print(row(f"{entries:,}", medians({name: (lambda way=way: way(flat, count)) for name, way in WAYS.items()}, 7)))


def whole_model(kept: float) -> None:
    """A step's worth: weights that moved off their zeros a little, then the projection, then the clipping."""
    model = SparseTransformer(SparseConfig(n_layer=2, d_model=256, block_size=64, vocab_size=1024))
    project(model, kept)
    weights = [parameter for _, parameter in sparse_parameters(model)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    moved = [(weight + 1e-3 * weight.grad).detach() for weight in weights]

    def move() -> None:
        for weight, to in zip(weights, moved, strict=True):
            weight.data.copy_(to)

    steps = {
        "move": move,
        "move and project": lambda: (move(), project(model, kept)),
        "clip": lambda: clip_to_rms(weights),
    }
    print(row(f"density {kept}, {sum(weight.numel() for weight in weights):,} weights", medians(steps)))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(header("entries, 1 in 50 kept, ms", list(WAYS)))
    for entries in (30_000, 500_000, 2048 * 8192):
        one_tensor(entries)
    print("\n" + header("two layers, d_model 256, ms", ["move", "move and project", "clip"]))
    for kept in (0.5, 0.05, 0.015):
        whole_model(kept)


if __name__ == "__main__":
    main()
