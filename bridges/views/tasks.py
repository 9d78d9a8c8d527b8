"""What the page shows of a task: its prompts, whether both models solve it, its circuit's size, its steering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridges.channels.runs import Prompts, part_solved
from bridges.circuits.circuit import Circuit
from bridges.objective.pair import SIDES, ModelPair
from bridges.tasks.pairs import TaskPairs
from bridges.tasks.templates import EXAMPLES
from bridges.tasks.token_sets import TokenSets

EXAMPLES_SHOWN = 3
ANSWERS_SHOWN = 6
"""Tokens of an answer that is a set of them."""


def task_view(
    pair: ModelPair,
    pairs: TaskPairs,
    names: list[str],
    circuit: Circuit | None,
    circuit_missing: str,
    steering: Mapping[str, Any] | None,
    steering_missing: str,
) -> dict[str, Any]:
    """A task as the page's JSON has it; `pairs` are the prompts that `solved` is measured on.

    `circuit_missing` and `steering_missing` say why there is none, where there is none.
    """
    prompts = Prompts(pair, pairs)
    template = EXAMPLES.get(pairs.task)
    return {
        "name": pairs.task,
        "description": (template.__doc__ or "").strip() if template else "",
        "pairs": len(pairs),
        "solved": {side: part_solved(pair, prompts, side) for side in SIDES},
        "examples": [_example(pairs, i, names) for i in range(min(EXAMPLES_SHOWN, len(pairs)))],
        "circuit": circuit and {"nodes": circuit.n_nodes, "edges": circuit.n_edges, "loss": circuit.loss},
        "circuit_missing": "" if circuit else circuit_missing,
        "steering": dict(steering) if steering else {"one": None, "few": None},
        "steering_missing": "" if steering else steering_missing,
    }


def _example(pairs: TaskPairs, i: int, names: list[str]) -> dict[str, Any]:
    """Both prompts of a pair, where they differ, and the answers to each."""
    real = pairs.attention_mask[i].bool()
    prompt, other = (ids[i][real] for ids in (pairs.input_ids, pairs.counterfactual_ids))
    return {
        "prompt": [names[token] for token in prompt.tolist()],
        "counterfactual": [names[token] for token in other.tolist()],
        "cue": (prompt != other).nonzero().flatten().tolist(),
        "answers": _tokens(pairs.answer_sets, i, names),
        "targets": _tokens(pairs.target_sets, i, names),
    }


def _tokens(sets: TokenSets, i: int, names: list[str]) -> list[str]:
    row = sets.distinct[sets.index[i]]
    return [names[token] for token in row[row >= 0].tolist()[:ANSWERS_SHOWN]]
