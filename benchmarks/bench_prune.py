"""A training step of the masks of `bridges.prune`, forward and backward, by how many nodes are on, one thread.

`python benchmarks/bench_prune.py`: the model's own pass over padded prompts, the pass that computes every prefix once,
and the one that also computes with live nodes alone; then the seconds of a whole search.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from timing import header, medians, row
from torch import Tensor

import bridges
from bridges.circuits import pruning
from bridges.circuits.live import MaskedPass
from bridges.circuits.masks import Masks
from bridges.circuits.nodes import node_means, place_sizes
from bridges.circuits.prefixes import Prefixes, last_logits
from bridges.circuits.task_loss import Presented
from bridges.models.sparse.model import SparseTransformer

PAIRS = 32
SHARES = (1.0, 0.3, 1 / 16, 1 / 32, 1 / 64, 1 / 256, 1 / 1024)


def step_of(logits: Callable[[], Tensor], prompts: Presented, masks: Masks) -> Callable[[], object]:
    parameters = list(masks.parameters.values())
    return lambda: torch.autograd.grad(
        prompts.differences(logits()).sum(), parameters, allow_unused=True, materialize_grads=True
    )


def candidates(
    model: SparseTransformer, prompts: Presented, prefixes: Prefixes, masks: Masks
) -> dict[str, Callable[[], object]]:
    live = MaskedPass(model)

    def plain() -> Tensor:
        with masks.applied(model):
            return model(prompts.input_ids, attention_mask=prompts.attention_mask, logits_to_keep=1).logits[:, -1]

    def by_prefix() -> Tensor:
        with masks.applied(model):
            return last_logits(model, prefixes)

    passes = {"plain": plain, "by prefix": by_prefix, "live": lambda: live.live_logits(prefixes, masks)}
    return {name: step_of(logits, prompts, masks) for name, logits in passes.items()}


def random_masks(model: SparseTransformer, means: dict[str, Tensor], share: float) -> Masks:
    """Masks of which this share is on, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    sizes = place_sizes(model)
    masks = Masks(means, {place: torch.ones(size, dtype=torch.bool) for place, size in sizes.items()}, generator)
    for parameter in masks.parameters.values():
        off = torch.rand(len(parameter), generator=generator) >= share
        parameter.data[off] *= -1
    return masks


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["single_double_quote", "class_init"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="of the whole search of the first task")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pair = bridges.load_pair()
    model = pair.sparse
    with pruning.frozen_and_fast(model):
        for i, task in enumerate(args.tasks):
            pairs = bridges.task_pairs(task, pair.tokenizer, PAIRS)
            prompts = Presented.of(pairs, model.device)
            prefixes = Prefixes.of(prompts.input_ids, prompts.attention_mask)
            means = node_means(model, [(pairs.input_ids, pairs.attention_mask)])
            for share in SHARES:
                masks = random_masks(model, means, share)
                taken = medians(candidates(model, prompts, prefixes, masks), args.rounds)
                if i == 0 and share == SHARES[0]:
                    print(header("task, nodes on, ms", list(taken)))
                print(row(f"{task}, {int(masks.count())}", taken), flush=True)
    start = perf_counter()
    found = bridges.prune(model, args.tasks[0], tokenizer=pair.tokenizer, steps=args.steps, progress=False)
    print(f"{args.tasks[0]}: {found.n_nodes} nodes in {perf_counter() - start:.1f} s, of {args.steps} steps")


if __name__ == "__main__":
    main()
