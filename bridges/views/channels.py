"""What the page shows of nodes: `feature` of many at once, their histograms, and their values on the tasks' prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.channels.dense_side import BridgedNode, find_bridged
from bridges.channels.feature import dense_side_tokens, with_dense_side, with_readings_of_prompts
from bridges.circuits.features import describe_node, prompt_contexts
from bridges.circuits.nodes import Node, recorded_nodes
from bridges.circuits.pruning import frozen_and_fast
from bridges.io.progress import Bar
from bridges.models.sparse.model import SparseTransformer
from bridges.objective.pair import ModelPair
from bridges.tasks.pairs import TaskPairs

CONTEXTS, WEIGHTS = 6, 12
"""Contexts of each kind, and weights of each side."""
BINS, COLUMN_ENTRIES = 32, 12
"""Bars of a histogram, and entries of the decoder's column, the largest."""
ROWS = 32
"""Rows of a forward pass."""


@torch.no_grad()
def channel_views(
    model: SparseTransformer,
    nodes: Mapping[str, Sequence[TaskPairs]],
    rows: Int[Tensor, "rows seq"],
    names: list[str],
    pair: ModelPair | None = None,
    bar: Bar | None = None,
) -> dict[str, dict[str, Any]]:
    """Nodes as the page's JSON has them, from one pass over the text.

    Args:
        model: the sparse model.
        nodes: as `1.attn.read.118`, each with the pairs of prompts that it is shown on; the first of them are those of
            its dense side.
        rows: token rows without padding.
        names: the text of every token of both models.
        pair: both models with their bridges, for the dense side; None without a dense model.
        bar: advances by `channel_steps`.
    """
    bar = bar or Bar()
    with frozen_and_fast(model):
        values = _values(model, list(nodes), rows, bar)
        return {node: _view(model, node, shown, rows, values[node], names, pair, bar) for node, shown in nodes.items()}


def channel_steps(n_nodes: int, rows: Int[Tensor, "rows seq"]) -> int:
    """What `channel_views` with a dense model advances its bar by: tokens that a model runs on."""
    return rows.numel() + n_nodes * dense_side_tokens(rows)


def _values(
    model: SparseTransformer, nodes: Sequence[str], rows: Int[Tensor, "rows seq"], bar: Bar
) -> dict[str, Float[Tensor, "rows seq"]]:
    """Each node's value at every token."""
    parsed = {node: Node.parse(node, model) for node in nodes}
    found: dict[str, list[Tensor]] = {node: [] for node in nodes}
    with recorded_nodes(model, {node.place for node in parsed.values()}) as recorded:
        for ids in rows.split(ROWS):
            model(ids.to(model.device), use_cache=False)
            for name, node in parsed.items():
                found[name].append(recorded[node.place][..., node.index].cpu())
            bar.advance(ids.numel())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _view(
    model: SparseTransformer,
    node: str,
    shown: Sequence[TaskPairs],
    rows: Int[Tensor, "rows seq"],
    values: Float[Tensor, "rows seq"],
    names: list[str],
    pair: ModelPair | None,
    bar: Bar,
) -> dict[str, Any]:
    found = describe_node(model, node, rows, values, names, CONTEXTS, WEIGHTS, seed=0)
    bridged = None
    if pair is not None:
        found = with_dense_side(found, pair, rows, values, names, shown[0] if shown else None, 0, bar)
        bridged = find_bridged(Node.parse(node), pair)
    site = bridged if isinstance(bridged, BridgedNode) else None
    contexts = {pairs.task: prompt_contexts(model, node, pairs, names) for pairs in shown}
    if pair is not None and site is not None:
        contexts = {pairs.task: with_readings_of_prompts(contexts[pairs.task], pair, site, pairs) for pairs in shown}
    return {
        **found.to_dict(),
        "histogram": histogram(values[values != 0]),
        "task_contexts": {task: [asdict(one) for one in some] for task, some in contexts.items()},
        "decoder_column": None if site is None or pair is None else _largest_of_column(pair, site),
    }


def histogram(values: Float[Tensor, " n"], bins: int = BINS) -> dict[str, list[float]] | None:
    """Counts of the values in bars of equal width from the least to the largest; None of no values.

    >>> histogram(torch.tensor([0.0, 1.0, 1.0]), bins=2)
    {'edges': [0.0, 0.5, 1.0], 'counts': [1, 2]}
    """
    if not len(values):
        return None
    counts, edges = torch.histogram(values.double(), bins)
    return {"edges": edges.tolist(), "counts": counts.long().tolist()}


def _largest_of_column(pair: ModelPair, node: BridgedNode) -> list[tuple[int, float]]:
    """The dense channels that the decoder adds most to, with their weights."""
    column = pair.bridge_set[node.site].decoder_weight[:, node.name.index].detach().float().cpu()
    top = column.abs().topk(min(COLUMN_ENTRIES, len(column))).indices
    return [(i, column[i].item()) for i in top.tolist()]
