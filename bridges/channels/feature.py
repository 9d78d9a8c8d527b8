"""feature(): what a node of the sparse model does on text, and what its channel is in the dense model."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.channels.dense_side import (
    N_RANDOM,
    BridgedNode,
    effect_rows,
    encoder_readings,
    find_bridged,
    measure_dense_side,
)
from bridges.channels.prompts import check_text, frozen_pair, resolve_task
from bridges.circuits.feature_view import Context, Feature
from bridges.circuits.features import (
    describe_node,
    node_activations,
    prompt_contexts,
    sparse_transformer,
    token_names,
)
from bridges.circuits.nodes import Node
from bridges.circuits.pruning import frozen_and_fast
from bridges.circuits.text import mean_text
from bridges.io.progress import Bar, progress_bar
from bridges.models.loading import find_tokenizer
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.objective.pair import ModelPair
from bridges.tasks.pairs import TaskPairs

N_PAIRS = 64
"""Pairs of a named task that the dense model's mean difference is taken over."""


def feature(
    sparse: nn.Module | ResidualModel | str | Path,
    node: str,
    text: Int[Tensor, "rows seq"] | None = None,
    *,
    dense: nn.Module | ResidualModel | str | Path | None = None,
    bridge_set: BridgeSet | None = None,
    task: str | TaskPairs | None = None,
    tokenizer: Any = None,
    contexts: int = 8,
    weights: int = 12,
    text_tokens: int = 65_536,
    seed: int = 0,
    check_models: bool = True,
    progress: bool = True,
) -> Feature:
    """Look at what a node of a weight-sparse transformer does, and at its channel in a dense model.

    Args:
        sparse: a `SparseTransformer`: an object, a folder or a hub id.
        node: as `1.attn.read.118`.
        text: token rows without padding; by default the bundled corpus where its tokenizer is the model's, else sampled
            rows.
        dense: the dense model, for the dense side of reads and writes (method, section 6).
        bridge_set: the bridges between both models; goes with `dense`.
        task: one of `TASKS`, or pairs of prompts: what the node does on the first of them, and for the dense side their
            mean difference, which the channel is compared to.
        tokenizer: turns tokens into text; by default the one saved with a model, else tokens are shown as numbers.
        contexts: how many of each kind.
        weights: how many of each side.
        text_tokens: tokens of the text that are used, at most; changes of the dense model's logits take 2,048 of them.
        seed: of the random contexts and directions, of the task's prompts, and of the text where none is given.
        check_models: whether to refuse models that the bridges were not fitted to.
        progress: whether to show a bar while the dense model runs.

    Returns:
        A `Feature`, which prints as text; `.to_dict()` is JSON. `.dense` is None without a dense model, and for nodes
        that are no channel of a bridged stream.

    Raises:
        ValueError: the model has no such node; `dense` and `bridge_set` are not given together; text or task do not
            fit the models.

    >>> import bridges
    >>> pair = bridges.load_pair()
    >>> found = feature(pair.sparse, "final.read.5", tokenizer=pair.tokenizer, text_tokens=2048, contexts=2)
    >>> found.node, found.tokens, len(found.random) <= 2, found.dense
    ('final.read.5', 2048, True, None)
    >>> rows = torch.randint(1024, (64, 16), generator=torch.Generator().manual_seed(0))
    >>> quick = {"sites": ("final",), "ridge": 0.1, "progress": False}
    >>> bridge_set = bridges.fit(pair.dense, pair.sparse, rows, steps=0, **quick)
    >>> found = feature(pair.sparse, "final.read.5", rows, dense=pair.dense, bridge_set=bridge_set, progress=False)
    >>> found.dense.site, len(found.dense.raised), found.dense.kl > 0
    ('final', 10, True)
    """
    if (dense is None) != (bridge_set is None):
        given, missing = ("dense", "bridge_set") if bridge_set is None else ("bridge_set", "dense")
        raise ValueError(f"{missing}=None, but {given} is given; the dense side needs both: pass {missing} too")
    model = sparse_transformer(sparse)
    Node.parse(node, model)
    known = tokenizer if tokenizer is not None else _saved_tokenizer(sparse, dense)
    rows = torch.cat([ids for ids, _ in mean_text(model, text, known, text_tokens, seed)])
    pairs = None if task is None else resolve_task(task, sparse if dense is None else dense, known, N_PAIRS, seed)
    if dense is None or bridge_set is None:
        names = token_names(known, model.config.vocab_size)
        return _on_text_and_prompts(model, node, rows, pairs, names, contexts, weights, seed)[0]
    with frozen_pair(dense, model, bridge_set, check_models) as pair:
        check_text(pair, rows)
        names = token_names(known, max(model.config.vocab_size, pair.dense.vocab_size))
        found, values = _on_text_and_prompts(model, node, rows, pairs, names, contexts, weights, seed)
        with progress_bar(f"{node} in the dense model", dense_side_tokens(rows), progress) as bar:
            return with_dense_side(found, pair, rows, values, names, pairs, seed, bar)


def _on_text_and_prompts(
    model: SparseTransformer,
    node: str,
    rows: Int[Tensor, "rows seq"],
    pairs: TaskPairs | None,
    names: list[str],
    contexts: int,
    weights: int,
    seed: int,
) -> tuple[Feature, Float[Tensor, "rows seq"]]:
    """What a node does in the sparse model, and its values on the text."""
    values = node_activations(model, node, rows)
    found = describe_node(model, node, rows, values, names, contexts, weights, seed)
    if pairs is not None:
        with frozen_and_fast(model):
            found = replace(found, task=pairs.task, prompts=prompt_contexts(model, node, pairs, names))
    return found, values


def _saved_tokenizer(*models: Any) -> Any:
    """The first tokenizer that is saved with one of the models, else None."""
    found = (find_tokenizer(model) for model in models if model is not None)
    return next((tokenizer for tokenizer in found if tokenizer is not None), None)


def dense_side_tokens(rows: Int[Tensor, "rows seq"]) -> int:
    """Tokens that the dense model runs on for the dense side of one node, which a bar advances by."""
    return rows.numel() + (1 + N_RANDOM) * effect_rows(rows).numel()


def with_dense_side(
    found: Feature,
    pair: ModelPair,
    rows: Int[Tensor, "rows seq"],
    values: Float[Tensor, "rows seq"],
    names: list[str],
    task: TaskPairs | None,
    seed: int,
    bar: Bar,
) -> Feature:
    """The same feature with its dense side, or with the reason why it has none.

    `values` are the node's on the text `rows`; the other arguments are those of `measure_dense_side`.
    """
    node = find_bridged(Node.parse(found.node), pair)
    if isinstance(node, str):
        bar.advance(dense_side_tokens(rows))
        return replace(found, no_dense_side=node)
    readings = encoder_readings(pair, node, rows, bar)
    side = measure_dense_side(pair, node, rows, values, readings, names, task, seed, bar)
    shown = {
        kind: [_with_readings(context, readings) for context in getattr(found, kind)]
        for kind in ("positive", "negative", "random")
    }
    prompts = [] if task is None or not found.prompts else with_readings_of_prompts(found.prompts, pair, node, task)
    return replace(found, dense=side, prompts=prompts, **shown)


def with_readings_of_prompts(
    contexts: list[Context], pair: ModelPair, node: BridgedNode, task: TaskPairs
) -> list[Context]:
    """The contexts that `prompt_contexts` gave, with what the encoder reads in the dense model at their tokens."""
    found = []
    for context, ids in zip(contexts, cycle((task.input_ids, task.counterfactual_ids)), strict=False):
        row = ids[context.row][task.attention_mask[context.row].bool()][None]
        found.append(replace(context, readings=encoder_readings(pair, node, row, Bar())[0].tolist()))
    return found


def _with_readings(context: Context, readings: Float[Tensor, "rows seq"]) -> Context:
    start = context.position - context.at
    return replace(context, readings=readings[context.row, start : start + len(context.tokens)].tolist())
