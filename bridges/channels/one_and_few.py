"""The two sweeps that a page shows of a task: of the one channel, and of the few, that turn both models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from bridges.channels.dense_side import BridgedNode, find_bridged
from bridges.channels.find import CHOSEN_ON, find_sizes
from bridges.channels.from_circuit import circuit_channels
from bridges.channels.runs import Prompts
from bridges.channels.search import SearchOptions
from bridges.channels.sweep import STRENGTHS, sweep_prompts
from bridges.channels.sweep_result import Sweep
from bridges.circuits.circuit import Circuit
from bridges.circuits.nodes import Node
from bridges.objective.pair import ModelPair
from bridges.tasks.pairs import TaskPairs

MAX_CHANNELS = 4
"""Channels of a set, at most."""


@torch.no_grad()
def sweep_one_and_few(
    pair: ModelPair,
    pairs: TaskPairs,
    circuit: Circuit | None,
    search_text: Int[Tensor, "rows seq"],
    reported_text: Int[Tensor, "rows seq"],
    others: Sequence[TaskPairs] = (),
    progress: bool = False,
    max_channels: int = MAX_CHANNELS,
) -> tuple[Sweep, Sweep]:
    """Edit the one channel that does most to both models' answers, then the few that do; the circuit's are tried first.

    Channels are chosen on the first `CHOSEN_ON` of `pairs` and on `search_text`, and reported on the rest of the pairs
    and on `reported_text`; `others` are prompts of other tasks. Raises NoChannelsFoundError if no channel turns both
    models within the search's budget.
    """
    nodes = circuit_channels(circuit, pair, pairs.task) if circuit is not None and _is_bridged(circuit, pair) else None
    chosen_on, reported = (Prompts(pair, part) for part in (pairs.rows(0, CHOSEN_ON), pairs.rows(CHOSEN_ON)))
    options = SearchOptions(max_channels, by="both")
    one, few = (
        sweep_prompts(
            pair, chosen_on, reported, found.best, STRENGTHS, reported_text, others, found.agreement, progress
        )
        for found in find_sizes(pair, chosen_on, search_text, options, progress, nodes)
    )
    return one, few


def _is_bridged(circuit: Circuit, pair: ModelPair) -> bool:
    """Whether some node of the circuit is a channel of a bridged stream."""
    nodes = (Node(place, i) for place, indices in circuit.nodes.items() for i in indices)
    return any(isinstance(find_bridged(node, pair), BridgedNode) for node in nodes)
