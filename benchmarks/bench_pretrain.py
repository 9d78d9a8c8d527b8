"""A step of `pretrain` against density, beside the dense step: python benchmarks/bench_pretrain.py [--widths 1024 4096]

The dense step is the paper's: AdamW on every weight, then the projection. Both are measured in turns.
"""

import argparse
import time

import torch

from bridges.models.sparse.config import SparseConfig
from bridges.models.sparse.model import SparseTransformer
from bridges.sparsity.pretraining import Pretrainer, prune_to_start
from bridges.sparsity.settings import PretrainConfig

VOCAB, SEQ, ROWS = 1024, 64, 8
DENSITIES = (1 / 16, 1 / 64, 1 / 256, 1 / 1000)
MOVE_EVERY = 25


def trainer(width: int, density: float, support: str) -> Pretrainer:
    """One layer, as many neurons as channels."""
    torch.manual_seed(0)
    shape = {"d_model": width, "d_mlp": width, "n_head": width // 16, "d_head": 16, "block_size": SEQ}
    model = SparseTransformer(SparseConfig(vocab_size=VOCAB, n_layer=1, **shape)).train()
    settings = {"start_density": density, "target_density": density, "support": support, "move_every": MOVE_EVERY}
    config = PretrainConfig(steps=10_000, **settings)
    return Pretrainer(model, None, config, prune_to_start(model, config))


def seconds(one: Pretrainer, move: bool) -> float:
    """The time of one step, which moves the support or not."""
    one.step = MOVE_EVERY - 1 if move else 0
    batch = torch.randint(VOCAB, (ROWS, SEQ))
    started = time.perf_counter()
    one.train_step([(batch, None)])
    return time.perf_counter() - started


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tokens = ROWS * SEQ
    print(f"{torch.get_num_threads()} threads, {tokens} tokens a step, float32, one layer, vocabulary {VOCAB}\n")
    columns = ("width", "density", "ms per 1,000 tokens", "dense step over it", f"with a move every {MOVE_EVERY} steps")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for width in args.widths:
        dense = trainer(width, 1.0, "projected")
        dense.densities = dense.densities._replace(start=0.01, target=0.01)  # so that the projection has work to do
        for density in DENSITIES:
            sparse = trainer(width, density, "moving")
            for warm_up in (dense, sparse):
                seconds(warm_up, move=False)
            steps, moves, whole = [], [], []
            for _ in range(args.rounds):
                whole.append(seconds(dense, move=False))
                steps.append(seconds(sparse, move=False))
                moves.append(seconds(sparse, move=True))
            step, move, of_dense = median(steps), median(moves), median(whole)
            amortised = ((MOVE_EVERY - 1) * step + move) / MOVE_EVERY
            name = f"1/{round(1 / density)}"
            figures = f"{1e6 * step / tokens:.0f} | {of_dense / step:.1f}x | {of_dense / amortised:.1f}x"
            print(f"| {width} | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
