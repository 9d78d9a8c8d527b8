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
from bridges.circuits.text import is_bundled, mean_text
from bridges.io.progress import progress_bar
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.objective.pair import ModelPair
from bridges.report.page import FORMAT
from bridges.tasks.pairs import TaskPairs, task_pairs
from bridges.views.channels import channel_steps, channel_views
from bridges.views.circuit import circuit_view
from bridges.views.tasks import task_view

PAIRS, PAIRS_SEED = 64, 2
"""Prompts of each task that the page's own figures are measured on: not those that its circuit was found on."""
TEXT_TOKENS = 16_384
"""Tokens of text that channels are shown on."""
DIGITS = 7
"""Significant digits of every number in the page's data: more than it shows, since a second rounding adds error."""
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
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Tasks that there are results of and that no page can show, and why."""


def page_data(
    pair: ModelPair,
    results: Results,
    tasks: Sequence[str],
    tokenizer: Any,
    *,
    text: Int[Tensor, "rows seq"] | None = None,
    text_source: str = "text that was given",
    channels: Mapping[str, Mapping[str, Any]] | None = None,
    headline: str = "",
    title: str = "Bridges",
    progress: bool = True,
) -> dict[str, Any]:
    """Everything that the page shows.

    Args:
        pair: both models with their bridges, frozen.
        results: bridge figures, circuits and sweeps; those of other tasks than `tasks` are left out.
        tasks: the tasks that the page has, in order; those that the tokenizer does not allow are left out, and named.
        tokenizer: the one of both models.
        text: token rows that channels are shown on; by default the bundled corpus where its tokenizer is the models',
            else rows sampled from the sparse model.
        text_source: what `text` is, in words.
        channels: nodes that `channel_views` has been asked of already, which are not looked at again.
        headline: the task whose steering stands on the first view; by default the one that turns both models most.
        title: of the page.
        progress: whether to show bars.
    """
    model = pair.sparse.model if isinstance(pair.sparse.model, SparseTransformer) else None
    circuits = results.circuits if model is not None else {}
    pairs, left_out = _pairs_of(tasks, tokenizer, circuits)
    circuits = {task: circuits[task] for task in pairs if task in circuits}
    steering = {task: results.steering[task] for task in pairs if task in results.steering}
    names = token_names(tokenizer, max(pair.dense.vocab_size, pair.sparse.vocab_size))
    if text is None:
        text_source = "bundled corpus" if is_bundled(tokenizer) else "sampled from the sparse model"
    data = {
        "format": FORMAT,
        "title": title,
        "versions": dict(results.report.versions),
        "headline": headline or _best_steered(steering),
        "models": {"dense": _model(pair.dense), "sparse": _model(pair.sparse)},
        "bridges": _bridges(pair, results.report),
        "text": text_source,
        "left_out": {**left_out, **results.left_out},
        "tasks": [],
        "circuits": {},
        "channels": {},
    }
    with progress_bar("tasks", len(pairs), progress) as bar:
        for task, prompts in pairs.items():
            reasons = results.circuits_missing.get(task, ""), results.steering_missing.get(task, "")
            of_task = circuits.get(task), reasons[0], steering.get(task), reasons[1]
            data["tasks"].append(task_view(pair, prompts, names, *of_task))
            bar.advance()
    if model is not None:
        with progress_bar("circuits", sum(circuit.n_nodes for circuit in circuits.values()), progress) as bar:
            for task, circuit in circuits.items():
                data["circuits"][task] = circuit_view(model, circuit, pairs[task], names, bar)
        nodes = {
            node: [pairs[task] for task in of_node[:SEVERAL_TASKS]]
            for node, of_node in _nodes(model, circuits, steering).items()
        }
        data["channels"] = _channels(model, pair, nodes, channels or {}, text, tokenizer, names, progress)
    return rounded(data)


def _pairs_of(
    tasks: Sequence[str], tokenizer: Any, circuits: Mapping[str, Circuit]
) -> tuple[dict[str, TaskPairs], dict[str, str]]:
    """The prompts of each task, and why some have none."""
    pairs, left_out = {}, {}
    for task in tasks:
        try:
            pairs[task] = page_pairs(task, tokenizer, circuits.get(task))
        except ValueError as error:
            left_out[task] = str(error)
    return pairs, left_out


def _channels(
    model: SparseTransformer,
    pair: ModelPair,
    nodes: Mapping[str, Sequence[TaskPairs]],
    known: Mapping[str, Mapping[str, Any]],
    text: Int[Tensor, "rows seq"] | None,
    tokenizer: Any,
    names: list[str],
    progress: bool,
) -> dict[str, Mapping[str, Any]]:
    """The views of all nodes, those that are not known made now."""
    new, made = {node: prompts for node, prompts in nodes.items() if node not in known}, {}
    if new:
        rows = torch.cat([ids for ids, _ in mean_text(model, text, tokenizer, TEXT_TOKENS, seed=0)])
        with progress_bar("channels", channel_steps(len(new), rows), progress) as bar:
            made = channel_views(model, new, rows, names, pair, bar)
    return {node: made[node] if node in made else known[node] for node in nodes}


def page_pairs(task: str, tokenizer: Any, circuit: Circuit | None = None) -> TaskPairs:
    """The prompts of a task that the page shows, and that its own figures are measured on.

    Other seeds repeat some prompts of tasks that have few, so those that the circuit was searched on are left out.
    Raises ValueError if the tokenizer does not allow the task.
    """
    settings = circuit.settings if circuit is not None else {}
    if not {"n", "seed"} <= settings.keys():
        return task_pairs(task, tokenizer, PAIRS, PAIRS_SEED)
    searched = set(_prompts(task_pairs(task, tokenizer, settings["n"], settings["seed"])))
    # Equal seeds begin with equal prompts.
    seed = PAIRS_SEED + (settings["seed"] == PAIRS_SEED)
    drawn = task_pairs(task, tokenizer, 2 * PAIRS, seed)
    new = [i for i, pair in enumerate(_prompts(drawn)) if pair not in searched]
    if not new:
        raise ValueError(f"task {task!r} has no prompts but those that its circuit was searched on")
    return drawn.take(torch.tensor(new[:PAIRS], dtype=torch.long))


def _prompts(pairs: TaskPairs) -> list[frozenset[tuple[int, ...]]]:
    """Both prompts of every pair, without padding, in either order."""
    rows = zip(pairs.input_ids, pairs.counterfactual_ids, pairs.attention_mask.bool(), strict=True)
    return [frozenset({tuple(ids[real].tolist()), tuple(other[real].tolist())}) for ids, other, real in rows]


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """The same with every number at so many significant digits, and None for those that JSON does not have.

    >>> rounded({"p": [0.123456789, float("nan")], "n": 1234567})
    {'p': [0.1234568, None], 'n': 1234567}
    """
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def _best_steered(steering: Mapping[str, Mapping[str, Any]]) -> str:
    """The task on which an edit of strength 1 turns both models most, of one channel before that of a few."""

    def p_target(task: str) -> tuple[bool, float]:
        one, few = (_p_of_both(steering[task][which]) for which in ("one", "few"))
        return one > 0.5, one if one > 0.5 else few or one

    return max(steering, key=p_target, default="")


def _p_of_both(sweep: Mapping[str, Any] | None) -> float:
    """P(target) at strength 1 of the model that is turned less; 0 where nothing was measured."""
    if not sweep or 1.0 not in sweep["strengths"]:
        return 0.0
    at = sweep["strengths"].index(1.0)
    return min(sweep["p_target"][at], sweep["p_target_sparse_model"][at])


def _model(model: ResidualModel) -> dict[str, Any]:
    inner = model.model
    found = {
        "name": _name(inner),
        "layers": len({str(site).split(".")[0] for site in model.sites} - {"final"}),
        "width": model.d_model,
        "parameters": sum(parameter.numel() for parameter in inner.parameters()),
        "nonzeros": None,
    }
    if isinstance(inner, SparseTransformer):
        found["nonzeros"] = sum(int(parameter.count_nonzero()) for parameter in inner.parameters())
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
    kept = ("tokens", "nmse_tokens", "dense_ce", "sparse_ce", "kl_sparse_alone", "sites", "mean")
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
                add((f"{sweep['site']}.read.{channel}" for channel in channels), task)
    places = list(place_sizes(model))
    order = sorted(found, key=lambda node: (places.index(node.rpartition(".")[0]), int(node.rpartition(".")[2])))
    return {node: found[node] for node in order}
