"""What a model does without a circuit, and the union of circuits that it cannot do without."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bridges.circuits.circuit import Circuit, figures
from bridges.circuits.search import Search, TargetNotReached
from bridges.circuits.task_loss import Presented, answer_differences, calibrate
from bridges.models.sparse.model import SparseTransformer
from bridges.tasks.pairs import TaskPairs

NECESSARY_LOSS = math.log(2) / 2
"""A circuit is necessary where the model without it has at least this loss, in nats: half of that of guessing."""


@torch.no_grad()
def necessity(model: SparseTransformer, circuit: Circuit, pairs: TaskPairs) -> dict[str, float]:
    """(b) The task when only the circuit is ablated, with a scale and shift of its own; ln 2 is guessing."""
    prompts = Presented.of(pairs, model.device)
    with circuit.ablate(model):
        differences = answer_differences(model, prompts)
    found = figures(differences, prompts, calibrate(differences, prompts.sign))
    return {"loss": found.loss, "loss_unscaled": found.loss_unscaled, "accuracy": found.accuracy}


def with_other_routes(
    first: Circuit,
    pairs: TaskPairs,
    rounds: int,
    search: Callable[[Mapping[str, Tensor] | None], Search],
    find: Callable[[Search], Circuit],
) -> Circuit:
    """The union of a circuit and of those that do the task without it, until the model without all of them fails.

    `search` makes a search whose nodes that are forbidden, by place, stay off; `find` runs one. At most `rounds`
    circuits are found, the first included. It ends too where the nodes that are left hold no circuit that reaches the
    target, or where the union would miss it.
    """
    whole, union, sizes = search(None), first, [first.n_nodes]
    while len(sizes) < rounds and necessity(whole.model, union, pairs)["loss"] < NECESSARY_LOSS:
        taken = union.masks(whole.model)
        try:
            other = find(search(taken))
        except TargetNotReached:
            break
        judged = whole.judged({place: mask | taken[place] for place, mask in other.masks(whole.model).items()})
        if judged.loss > whole.config.target_loss:
            break
        union = whole.circuit(judged, first.loss_full_model)
        sizes.append(other.n_nodes)
    return replace(union, settings={**first.settings, "round_sizes": sizes})
