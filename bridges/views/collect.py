"""The page's data: everything that it shows of two models, their bridges, their tasks and circuits, as one JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from bridges.bridge_report import BridgeReport
from bridges.circuits.circuit import Circuit
from bridges.circuits.features import token_names
from bridges.circuits.nodes import place_sizes
from bridges.circuits.text import mean_text
from bridges.io.progress import progress_bar
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.objective.hybrid import ModelPair
from bridges.sparsity.projection import sparse_parameters
from bridges.tasks.pairs import TaskPairs, task_pairs
from bridges.views.channels import channel_steps, channel_views
from bridges.views.circuit import circuit_view
from bridges.views.tasks import task_view

FORMAT = 1
PAIRS, PAIRS_SEED = 64, 2
"""Prompts of each task that the page's own figures are measured on, of a seed that nothing is found or chosen on."""
TEXT_TOKENS = 16_384
"""Tokens of text that channels are shown on."""
DIGITS = 5
"""Significant digits of every number in the page."""
SEVERAL_TASKS = 3
"""Tasks whose prompts a channel is shown on, at most: a channel may be in the circuits of many."""


@dataclass(frozen=True)
class Results:
    """What has been found about a pair of models and its bridges."""

    report: BridgeReport
    circuits: Mapping[str, Circuit] = field(default_factory=dict)
    """By task."""
    steering: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By task: `one` and `few`, each what `Sweep.to_dict` gives, or None."""
    circuits_missing: Mapping[str, str] = field(default_factory=dict)
    """By task, why it has no circuit."""
    steering_missing: Mapping[str, str] = field(default_factory=dict)
    """By task, why it has no steering."""


def page_data(
    pair: ModelPair,
    results: Results,
    tasks: Sequence[str],
    tokenizer: Any,
    *,
    text: Int[Tensor, "rows seq"] | None = None,
    channels: Mapping[str, Mapping[str, Any]] | None = None,
    headline: str = "",
    title: str = "Bridges",
    progress: bool = True,
) -> dict[str, Any]:
    """Everything that the page shows.

    Args:
        pair: both models with their bridges, frozen.
        results: bridge figures, circuits and sweeps; those of other tasks than `tasks` are left out.
        tasks: the tasks that the page has, in order.
        tokenizer: the one of both models.
        text: token rows that channels are shown on; by default the bundled corpus where its tokenizer is the models',
            else rows sampled from the sparse model.
        channels: nodes that `channel_views` has been asked of already, which are not looked at again.
        headline: the task whose steering stands on the first view; by default the one that turns both models most.
        title: of the page.
        progress: whether to show bars.
    """
    names = token_names(tokenizer, max(pair.dense.vocab_size, pair.sparse.vocab_size))
    pairs = {task: page_pairs(task, tokenizer) for task in tasks}
    steering = {task: results.steering[task] for task in tasks if task in results.steering}
    model = pair.sparse.model if isinstance(pair.sparse.model, SparseTransformer) else None
    circuits = {task: results.circuits[task] for task in tasks if task in results.circuits and model is not None}
    shown: list[dict[str, Any]] = []
    with progress_bar("tasks", len(tasks), progress) as bar:
        for task in tasks:
            missing = (results.circuits_missing.get(task, ""), results.steering_missing.get(task, ""))
            of_task = circuits.get(task), missing[0], steering.get(task), missing[1]
            shown.append(task_view(pair, pairs[task], names, *of_task))
            bar.advance()
    views, known = {}, dict(channels or {})
    if model is not None:
        with progress_bar("circuits", sum(circuit.n_nodes for circuit in circuits.values()), progress) as bar:
            for task, circuit in circuits.items():
                views[task] = circuit_view(model, circuit, pairs[task], names, bar)
        nodes = _nodes(model, circuits, steering)
        new = {node: [pairs[task] for task in of_node[:SEVERAL_TASKS]] for node, of_node in nodes.items()}
        new = {node: prompts for node, prompts in new.items() if node not in known}
        if new:
            rows = torch.cat([ids for ids, _ in mean_text(model, text, tokenizer, TEXT_TOKENS, seed=0)])
            with progress_bar("channels", channel_steps(len(new), rows, with_dense=True), progress) as bar:
                known |= channel_views(model, new, rows, names, pair, bar)
        known = {node: known[node] for node in nodes}
    data = {
        "format": FORMAT,
        "title": title,
        "versions": dict(results.report.versions),
        "headline": headline or _best_steered(steering),
        "models": {"dense": _model(pair.dense), "sparse": _model(pair.sparse)},
        "bridges": _bridges(pair, results.report),
        "tasks": shown,
        "circuits": views,
        "channels": known,
    }
    return rounded(data)


def page_pairs(task: str, tokenizer: Any) -> TaskPairs:
    """The prompts of a task that the page shows, and that its own figures are measured on."""
    return task_pairs(task, tokenizer, PAIRS, PAIRS_SEED)


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """The same with every number at so many significant digits, and None for those that JSON does not have.

    >>> rounded({"p": [0.123456789, float("nan")], "n": 1234567})
    {'p': [0.12346, None], 'n': 1234567}
    """
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def steered_p(steering: Mapping[str, Any] | None, which: str) -> float:
    """P(target) at strength 1 of the model that is turned less; 0 where nothing was measured."""
    sweep = (steering or {}).get(which)
    return min(sweep["p_target"][-1], sweep["p_target_sparse_model"][-1]) if sweep else 0.0


def _best_steered(steering: Mapping[str, Mapping[str, Any]]) -> str:
    return max(steering, key=lambda task: steered_p(steering[task], "one"), default="")


def _model(model: ResidualModel) -> dict[str, Any]:
    inner = model.model
    found = {
        "name": _name(inner),
        "layers": len(model.sites) // 2,
        "width": model.d_model,
        "parameters": sum(parameter.numel() for parameter in inner.parameters()),
        "nonzeros": None,
        "nonzeros_per_row": None,
    }
    if isinstance(inner, SparseTransformer):
        weights = [parameter for _, parameter in sparse_parameters(inner) if parameter.ndim == 2]
        nonzeros = sum(int(weight.count_nonzero()) for weight in weights)
        rows = sum(weight.shape[0] for weight in weights)
        found |= {"nonzeros": nonzeros, "nonzeros_per_row": nonzeros / rows}
    return found


def _name(model: Any) -> str:
    """The model's class, and its folder's or hub id's last part where it was loaded from one."""
    path = str(getattr(model, "name_or_path", "") or getattr(model.config, "name_or_path", ""))
    last = path.rstrip("/").rpartition("/")[2]
    return f"{type(model).__name__} {last}".strip()


def _bridges(pair: ModelPair, report: BridgeReport) -> dict[str, Any]:
    values = report.to_dict()
    of_site = {bridge_site: i for i, bridge_site in enumerate(pair.bridge_set.sites)}
    for site in values["sites"]:
        i = of_site[site["name"]]
        bridge = pair.bridge_set[i]
        d_sparse, d_dense = bridge.encoder_weight.shape
        site |= {
            "dense_site": pair.bridge_set.site_pairs[i][0],
            "d_dense": d_dense,
            "d_sparse": d_sparse,
            "k": bridge.k,
        }
    kept = ("tokens", "nmse_tokens", "dense_ce", "sparse_ce", "kl_sparse_alone", "sites", "mean", "selection")
    return {name: values[name] for name in kept}


def _nodes(
    model: SparseTransformer, circuits: Mapping[str, Circuit], steering: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[str]]:
    """The nodes of circuits and the channels that were steered, in the model's order, each with its tasks."""
    found: dict[str, list[str]] = {}

    def add(names: Iterable[str], task: str) -> None:
        for name in names:
            tasks = found.setdefault(name, [])
            if task not in tasks:
                tasks.append(task)

    for task, circuit in circuits.items():
        add((f"{place}.{i}" for place, indices in circuit.nodes.items() for i in indices), task)
    for task, of_task in steering.items():
        for sweep in of_task.values():
            if sweep:
                channels = sweep["channel"] if isinstance(sweep["channel"], list) else [sweep["channel"]]
                add((f"{sweep['site'].removesuffix('.block')}.read.{channel}" for channel in channels), task)
    places = list(place_sizes(model))
    order = sorted(found, key=lambda node: (places.index(node.rpartition(".")[0]), int(node.rpartition(".")[2])))
    return {node: found[node] for node in order}
