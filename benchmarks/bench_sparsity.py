"""The projection and the clipping after each step of weight-sparse training, one core.

`python benchmarks/bench_sparsity.py`
"""

from functools import partial

import torch
from timing import header, medians, row
from torch import Tensor

from bridges.models.sparse.config import SparseConfig
from bridges.models.sparse.model import SparseTransformer
from bridges.ops.abs_topk import abs_topk_mask, abs_topk_mask_eager
from bridges.sparsity.projection import clip_to_rms, project, sparse_parameters


def topk_and_scatter(flat: Tensor, count: int) -> Tensor:
    return torch.zeros_like(flat, dtype=torch.bool).scatter(0, flat.abs().topk(count, sorted=False).indices, True)


FUNCTIONS = {
    "torch.topk + scatter": topk_and_scatter,
    "eager twin": abs_topk_mask_eager,
    "abs_topk_mask": abs_topk_mask,
}


def one_tensor(entries: int) -> None:
    flat = 0.02 * torch.randn(entries)
    count = entries // 50
    taken = medians({name: partial(function, flat, count) for name, function in FUNCTIONS.items()}, rounds=7)
    print(row(f"{entries:,}", taken))


def whole_model(kept: float) -> None:
    """What one step costs: weights that have moved a little, the projection, the clipping of their gradients."""
    model = SparseTransformer(SparseConfig(n_layer=2, d_model=256, block_size=64, vocab_size=1024))
    project(model, kept)
    weights = [parameter for _, parameter in sparse_parameters(model)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    moved = [(weight + 1e-3 * weight.grad).detach() for weight in weights]

    def move() -> None:
        for weight, target in zip(weights, moved, strict=True):
            weight.data.copy_(target)

    steps = {
        "move": move,
        "move and project": lambda: (move(), project(model, kept)),
        "clip": lambda: clip_to_rms(weights),
    }
    print(row(f"density {kept}, {sum(weight.numel() for weight in weights):,} weights", medians(steps)))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(header("entries, 1 in 50 kept, ms", list(FUNCTIONS)))
    for entries in (30_000, 500_000, 2048 * 8192):
        one_tensor(entries)
    print("\n" + header("two layers, d_model 256, ms", ["move", "move and project", "clip"]))
    for kept in (0.5, 0.05, 0.015):
        whole_model(kept)


if __name__ == "__main__":
    main()
