"""prune(): the circuit of a task in a weight-sparse transformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from bridges.circuits.circuit import Circuit
from bridges.circuits.necessity import with_other_routes
from bridges.circuits.nodes import node_means
from bridges.circuits.search import Search
from bridges.circuits.settings import PruneConfig
from bridges.circuits.text import mean_text
from bridges.evaluate import versions
from bridges.io.fingerprint import fingerprint
from bridges.io.progress import progress_bar
from bridges.models.loading import as_residual, find_tokenizer
from bridges.models.modes import frozen
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.sparsity.support import use_sparse_kernels
from bridges.tasks.pairs import TaskPairs, task_pairs


@torch.inference_mode(False)
@torch.enable_grad()  # a notebook may have switched gradients off
def prune(
    sparse: nn.Module | ResidualModel | str | Path,
    task: str | TaskPairs,
    *,
    tokenizer: Any = None,
    text: Int[Tensor, "rows seq"] | None = None,
    progress: bool = True,
    config: PruneConfig | None = None,
    **settings: Any,
) -> Circuit:
    """Find the few nodes of a weight-sparse transformer that do a task when all others are frozen at their means.

    Masks learn on task loss + price * (nodes on), where the price follows the loss; then the number of nodes is
    bisected until the loss on pairs of its own is at `target_loss`, and nodes without which it stays there are dropped
    (paper 2.2 and A.5; method, section 6). With `method="attribution"` nodes are ranked by gradient times difference
    from the mean instead of by masks; the rest is the same. A model may do the task by other nodes too: with `rounds`
    over 1 these are looked for as well.

    Args:
        sparse: a `SparseTransformer` of any density: an object, a folder or a hub id.
        task: one of `TASKS`, or pairs of prompts; of these the last quarter chooses the size.
        tokenizer: makes the prompts of a named task; by default the one saved with the model.
        text: token rows [rows, seq] that the nodes' means are taken over; by default the bundled corpus where its
            tokenizer is the model's, else rows sampled from the model.
        progress: whether to show a progress bar.
        config: the settings; by default those of `PruneConfig()`.
        settings: single fields of `PruneConfig`, which replace those of `config`.

    Returns:
        The circuit, with means, scale and shift; nothing of the model is changed.

    Raises:
        ValueError: the model is no SparseTransformer, a setting is invalid, or the task cannot be brought to
            `target_loss` by any circuit; the message names the best loss reached.

    >>> import bridges
    >>> pair = bridges.load_pair()
    >>> quick = {"n": 8, "steps": 4, "target_loss": 0.5, "text_tokens": 512, "progress": False}
    >>> circuit = prune(pair.sparse, "single_double_quote", tokenizer=pair.tokenizer, **quick)
    >>> circuit.loss <= 0.5 and 0 < circuit.n_nodes
    True
    """
    config = (config or PruneConfig()).with_settings(settings)
    residual = as_residual(sparse)
    model = residual.model
    if not isinstance(model, SparseTransformer):
        raise ValueError(
            f"sparse={type(model).__name__} must be a SparseTransformer: its nodes are what a circuit is of"
        )
    known = tokenizer if tokenizer is not None else find_tokenizer(sparse)
    pairs = task_pairs(task, known, config.n, config.seed) if isinstance(task, str) else task
    with frozen_and_fast(model):
        batches = mean_text(model, text, known, config.text_tokens, config.seed)
        search = partial(Search, model, pairs, node_means(model, batches), config)
        searches = config.seeds + config.rounds - 1
        total = searches * config.steps if config.method == "masks" else None
        with progress_bar(f"pruning {pairs.task}", total, progress) as bar:
            first = search()
            found = [first.run(seed, bar) for seed in range(config.seeds)]
            best = min(found, key=lambda circuit: circuit.n_nodes)
            best = replace(best, settings={**best.settings, "sizes": [circuit.n_nodes for circuit in found]})
            if config.rounds > 1:
                judges = pairs.rows(len(first.train))
                best = with_other_routes(best, judges, config.rounds, search, lambda other: other.run(0, bar))
    return replace(best, fingerprint=fingerprint(model), versions=versions())


@contextmanager
def frozen_and_fast(model: SparseTransformer) -> Iterator[None]:
    """Inside, a model in evaluation mode that takes no gradients and multiplies by its nonzeros alone."""
    with frozen(model), use_sparse_kernels(model):
        yield
