"""sweep(): P(target) over strengths of an edit, with confidence bands and every baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.channels.agreement import N_CONTROLS, intervention_agreement
from bridges.channels.baselines import best_mean_difference
from bridges.channels.curves import (
    OTHER_ADDENDS,
    edit_curves,
    mean_difference_curve,
    n_random_directions,
    with_band,
)
from bridges.channels.find import CHOSEN_ON, FoundChannels, find
from bridges.channels.from_circuit import circuit_channels
from bridges.channels.prompts import (
    Channels,
    check_channels,
    check_text,
    frozen_pair,
    resolve_task,
    resolve_tokenizer,
)
from bridges.channels.reference_text import SAMPLED_ROWS, sample_text
from bridges.channels.runs import Prompts, p_target_under_edit, part_solved
from bridges.channels.search import BUDGET, By, SearchOptions
from bridges.channels.side_effects import other_tasks, side_effects
from bridges.channels.sweep_result import Sweep
from bridges.circuits.circuit import Circuit
from bridges.io.progress import announce, progress_bar
from bridges.models.residual import ResidualModel, context_limit
from bridges.objective.pair import SIDES, ModelPair
from bridges.report.curves import CURVES
from bridges.tasks.pairs import TaskPairs

STRENGTHS = tuple(i / 10 for i in range(11))


def sweep(
    dense: nn.Module | ResidualModel | str | Path,
    sparse: nn.Module | ResidualModel | str | Path,
    bridge_set: BridgeSet,
    task: str | TaskPairs,
    channels: Channels | FoundChannels | int | None = None,
    strengths: Sequence[float] = STRENGTHS,
    *,
    by: By = "dense",
    budget: float = BUDGET,
    circuit: Circuit | None = None,
    n: int = 200,
    tokenizer: Any = None,
    seed: int = 0,
    text: Int[Tensor, "rows seq"] | None = None,
    check_models: bool = True,
    progress: bool = True,
) -> Sweep:
    """Edit channels at several strengths and measure the dense model's answer, with every baseline (paper, figure 9).

    `dense`, `sparse`: model objects, `ResidualModel`s, folders or hub ids. `task`: one of `TASKS`, of which pairs are
    made with `tokenizer` (None: the one saved with the dense model), or `TaskPairs`, 66 or more.

    `channels` are edited as given: `Channels`, or the result of `find_channels`. A number (None: 1) searches first, as
    `find_channels(most=channels, by=by, budget=budget, circuit=circuit)` does. The search and the dense model's own
    directions use 64 pairs of the task; the curves are measured on the others, `n` of a named task. P(target) is the
    full-vocabulary probability of what answers the counterfactual prompt. Side effects are measured on `text` [rows,
    seq], token ids that have nothing to do with the task (None: sampled from the dense model; a search takes up to half
    of the given rows for its budget), and with a tokenizer on the other tasks. Memory does not grow with the number of
    pairs or rows. `progress=False` silences the bars on standard error.

    Raises ValueError for an argument that is out of range, an unknown task, site or channel, bridges of other models, a
    circuit of another model or task, or a search that finds nothing within its budget.

    >>> import bridges, torch
    >>> pair = bridges.load_pair()
    >>> rows = torch.randint(1024, (64, 32), generator=torch.Generator().manual_seed(0))
    >>> bridge_set = bridges.fit(pair.dense, pair.sparse, rows, steps=0, ridge=0.1, sites=("0.mlp",), progress=False)
    >>> pairs = bridges.task_pairs("for_while", pair.tokenizer, 70)
    >>> chosen = bridges.Channels("0.mlp", (3, 18), at="residual")
    >>> result = bridges.sweep(pair.dense, pair.sparse, bridge_set, pairs, chosen, (0.0, 1.0), text=rows[:2])
    >>> result.prompts, len(result.curves["p_target"].mean)
    (6, 2)
    """
    if not isinstance(channels, Channels | FoundChannels | Integral | None):
        raise ValueError(f"channels={channels!r} must be bridges.Channels, what find_channels returned, or how many")
    if circuit is not None and isinstance(channels, Channels | FoundChannels):
        raise ValueError(f"circuit of {circuit.task!r} is for a search; give channels= as a number, or no circuit")
    most = int(channels) if isinstance(channels, Integral) else 1
    options = SearchOptions(most, by, budget).checked("channels")
    strengths = check_strengths(strengths)
    if n < 2:
        raise ValueError(f"n={n} must be at least 2 prompts, one of each task order")
    tokenizer = resolve_tokenizer(dense, tokenizer)
    pairs = resolve_task(task, dense, tokenizer, n + CHOSEN_ON, seed)
    halves = _split_pairs(pairs)
    with frozen_pair(dense, sparse, bridge_set, check_models) as pair:
        chosen_on, reported = (Prompts(pair, half) for half in halves)
        rows = None if text is None else check_text(pair, text)
        if not isinstance(channels, Channels | FoundChannels):
            nodes = None if circuit is None else circuit_channels(circuit, pair, pairs.task, check_models)
            channels, rows = _search(pair, chosen_on, rows, options, seed, progress, (dense, sparse), nodes)
            chosen_on.forget()  # what it keeps is of all sites
        chosen, agreement, in_circuit = (
            (channels.best, channels.agreement, channels.in_circuit)
            if isinstance(channels, FoundChannels)
            else (channels, None, None)
        )
        rows = sample_text(pair, seed, for_search=False, sources=(dense, sparse)) if rows is None else rows
        others = [] if tokenizer is None else other_tasks(pairs.task, tokenizer, context_limit(pair.dense, pair.sparse))
        result = sweep_prompts(pair, chosen_on, reported, chosen, strengths, rows, others, agreement, progress)
        return replace(result, in_circuit=in_circuit)


def check_strengths(strengths: Any) -> list[float]:
    """Return the strengths as a list; raise ValueError unless they are finite numbers, at least one."""
    listed = strengths.tolist() if isinstance(strengths, Tensor | np.ndarray) else strengths
    finite = isinstance(listed, Sequence) and all(isinstance(s, Real) and math.isfinite(s) for s in listed)
    if not finite or not listed:
        raise ValueError(f"strengths={strengths!r} must be a list of finite numbers, at least one")
    return [float(strength) for strength in listed]


def _split_pairs(pairs: TaskPairs) -> tuple[TaskPairs, TaskPairs]:
    """The pairs to choose on and those to report; ValueError unless both hold both task orders."""
    if len(pairs.input_ids) < CHOSEN_ON + 2:
        raise ValueError(f"task has {len(pairs.input_ids)} pairs; give {CHOSEN_ON} to choose channels on and 2 or more")
    halves = pairs.rows(0, CHOSEN_ON), pairs.rows(CHOSEN_ON)
    if any(len(half.direction.unique()) < 2 for half in halves):
        raise ValueError(
            f"task needs both task orders (direction 0 and 1) in its first {CHOSEN_ON} pairs and in the rest"
        )
    return halves


def _search(
    pair: ModelPair,
    prompts: Prompts,
    text: Tensor | None,
    options: SearchOptions,
    seed: int,
    progress: bool,
    sources: tuple[Any, Any],
    circuit_nodes: Mapping[tuple[str, int], tuple[str, ...]] | None,
) -> tuple[FoundChannels, Tensor | None]:
    """Search for channels, and return the rows of text that are left to report on.

    The search takes up to half of the given rows; without any it samples its own.
    """
    n_rows = 0 if text is None else min(SAMPLED_ROWS, len(text) // 2)
    if text is None or not n_rows:
        rows = sample_text(pair, seed, sources=sources)
    else:
        rows, text = text[:n_rows], text[n_rows:]
    return find(pair, prompts, rows, options, progress, circuit_nodes), text


@torch.no_grad()
def sweep_prompts(
    pair: ModelPair,
    chosen_on: Prompts,
    reported: Prompts,
    chosen: Channels,
    strengths: Sequence[float],
    text: Int[Tensor, "rows seq"],
    other_pairs: Sequence[TaskPairs] = (),
    ranking_agreement: float | None = None,
    progress: bool = False,
) -> Sweep:
    """`sweep` on prompts that are checked; `ranking_agreement` comes from the search, if there was one."""
    check_channels(pair, chosen)
    pairs, n = reported.pairs, len(reported)
    what = f"{len(chosen.channels)} channel(s) at {chosen.site}, {len(strengths)} strengths"
    announce(f"sweep, {pairs.task}: {n} pairs, {what}, {text.numel()} tokens of text", progress)
    with progress_bar("mean difference at each site", len(pair.dense.sites) * len(chosen_on), progress) as bar:
        site, mean_difference = best_mean_difference(pair.dense, chosen_on, bar)
    n_curves = n_random_directions(pair.dense, reported, len(strengths)) + OTHER_ADDENDS + 1
    with progress_bar("curves of the edit and its baselines", n_curves * n, progress) as bar:
        curves = edit_curves(pair, chosen_on, reported, chosen, strengths, bar)
        curves["p_target_mean_difference"] = mean_difference_curve(
            pair, reported, site, mean_difference, strengths, bar
        )
    with progress_bar("agreement of both models", (2 + N_CONTROLS) * n, progress) as bar:
        agreement = intervention_agreement(pair, reported, chosen, bar)
    with progress_bar("side effects", len(text) + sum(map(len, other_pairs)), progress) as bar:
        effects = side_effects(pair, reported, chosen, text, other_pairs, bar)
    at_one = curves["p_target"][strengths.index(1.0)] if 1.0 in strengths else None
    at_one = p_target_under_edit(pair, reported, chosen) if at_one is None else at_one
    accuracy_dense, accuracy_sparse = (part_solved(pair, reported, side) for side in SIDES)
    return Sweep(
        task=pairs.task,
        chosen=chosen,
        strengths=list(strengths),
        curves={name: with_band(curves[name]) for name in CURVES},
        p_target_by_direction=[at_one[pairs.direction == direction].mean().item() for direction in (0, 1)],
        prompts=n,
        accuracy_dense=accuracy_dense,
        accuracy_sparse=accuracy_sparse,
        mean_difference_site=pair.dense.sites[site],
        agreement=agreement,
        effects=effects,
        ranking_agreement=ranking_agreement,
    )
