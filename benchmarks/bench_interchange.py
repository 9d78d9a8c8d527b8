"""What the interchange loss does, and a control of it: python benchmarks/bench_interchange.py [weights ...]

The demo's closed form, without gradient steps, at several weights of the interchange loss; the last row has the largest
weight with channels drawn at random, pair by pair, among those that change, instead of those that do most. Losses are
on held-out rows. For every task the single channel that does most is searched for; P(target) of the dense model is on
the prompts that it was chosen on, beside random directions of its norm (the strongest of five).
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bridges
from bridges.channels import CHOSEN_ON, find
from bridges.circuits.tasks import TASKS, task_pairs
from bridges.demo import HELDOUT_DOCUMENTS, SETTINGS, SIDE_EFFECT_ROWS, TRAIN_DOCUMENTS, demo_rows
from bridges.models.pair import Pair
from bridges.prompts import model_pair, prompts_of, text_of
from bridges.training import interchange

LOSSES = ("nmse_decode", "kl_dense_to_sparse", "kl_sparse_to_dense")
CHOSEN = interchange.chosen_channels


def drawn(generator: torch.Generator) -> Callable[..., tuple[Tensor, Tensor]]:
    """In place of `chosen_channels`: any channel that changes."""

    def channels(weight: Tensor, dz: Tensor, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        found = CHOSEN(weight, dz, *gradients)[1]
        changed = (dz != 0).any(1).double() + 1e-12
        return torch.multinomial(changed, 1, generator=generator)[:, 0], found

    return channels


def fitted(pair: Pair, weight: float, train: Tensor, heldout: Tensor) -> bridges.BridgeSet:
    settings: dict[str, Any] = {"steps": 0, "interchange_weight": weight, "progress": False}
    return bridges.fit(pair.dense, pair.sparse, train, eval_data=heldout, config=SETTINGS.with_settings(settings))


def line(pair: Pair, bridge_set: bridges.BridgeSet, name: str, text: Tensor, tasks: list[str]) -> str:
    assert bridge_set.report is not None, "fit always reports"
    p, random = [], []
    with model_pair(pair.dense, pair.sparse, bridge_set, check_models=False) as models:
        elsewhere = text_of(models, text)
        for task in tasks:
            prompts = prompts_of(models, task_pairs(task, pair.tokenizer, CHOSEN_ON))
            found = find(models, prompts, elsewhere).sets[-1]
            p.append(found.p_target)
            random.append(found.p_target_random)
    turned = sum(one > 0.5 for one in p)
    mean = bridge_set.report.to_dict()["mean"]
    losses = " | ".join(f"{mean[loss]:.3f}" for loss in LOSSES)
    return f"| {name} | {losses} | {turned} | {sum(p) / len(p):.3f} | {sum(random) / len(random):.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="*", type=float, default=[0.0, 0.02, 0.05, 0.15])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    args = parser.parse_args()
    pair = bridges.load_pair()
    train, heldout = (
        demo_rows(pair, split, n, SETTINGS.seq_len or 128, SETTINGS.seed)
        for split, n in (("train", TRAIN_DOCUMENTS), ("heldout", HELDOUT_DOCUMENTS))
    )
    print(f"| weight | {' | '.join(LOSSES)} | tasks over 0.5 | mean P(target) | random directions |\n|{'---|' * 7}")

    def show(weight: float, name: str) -> None:
        bridge_set = fitted(pair, weight, train, heldout)
        print(line(pair, bridge_set, name, train[:SIDE_EFFECT_ROWS], args.tasks), flush=True)

    for weight in args.weights:
        show(weight, f"{weight:g}")
    if max(args.weights) == 0:
        return
    interchange.chosen_channels = drawn(torch.Generator().manual_seed(0))
    weight = max(args.weights)
    show(weight, f"{weight:g}, channels drawn")


if __name__ == "__main__":
    main()
