"""report(): one HTML file of a run, which opens anywhere: its bridges, tasks, circuits and channels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bridges.bridge import BridgeSet
from bridges.channels.dense_side import BridgedNode, find_bridged
from bridges.channels.find import CHOSEN_ON, find_sizes
from bridges.channels.from_circuit import circuit_channels
from bridges.channels.prompts import frozen_pair
from bridges.channels.runs import Prompts
from bridges.channels.search import NoChannelsFoundError, SearchOptions, sample_text
from bridges.channels.side_effects import other_tasks
from bridges.channels.sweep import STRENGTHS, sweep_prompts
from bridges.circuits.circuit import Circuit
from bridges.circuits.many import pruned_tasks
from bridges.circuits.nodes import Node
from bridges.fitting.run_file import RunFile
from bridges.fitting.tracking import log_page
from bridges.io.files import write_json
from bridges.io.progress import announce
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.objective.hybrid import ModelPair
from bridges.report.page import write_page
from bridges.tasks.pairs import TASKS, TaskPairs, task_pairs
from bridges.views.collect import Results, page_data
from bridges.views.run_folder import CIRCUITS, RunFolder

PAGE = "index.html"
MAX_CHANNELS = 4
PROMPTS = 64
"""Pairs of a task that steering is reported on, others than those that channels are chosen on."""
SECONDS_PER_TASK = (60, 240)
"""What measuring a task takes on two cores with the bundled pair, said before it starts."""


def report(
    run_dir: str | Path,
    *,
    out: str | Path | None = None,
    tasks: Sequence[str] | str | None = None,
    dense: nn.Module | ResidualModel | str | Path | None = None,
    sparse: nn.Module | ResidualModel | str | Path | None = None,
    tokenizer: Any = None,
    json: bool = False,
    progress: bool = True,
) -> Path:
    """Write one HTML file that shows a run: bridges per site, tasks, circuits, and what channels mean in both models.

    Args:
        run_dir: a folder of `bridges fit` or `bridges demo`.
        out: the file; by default `index.html` in `run_dir`.
        tasks: names of `TASKS`, or "all". Circuits and steering that the folder lacks for them are searched for and
            measured first, and left in `circuits/` and `sweeps/`; the same call goes on with what is missing. By
            default the tasks that the folder has results of, and nothing is measured but what channels do.
        dense: the dense model, if not the one that the folder names.
        sparse: the sparse model, if not the one that the folder names.
        tokenizer: by default the one that the folder names, or that is saved with a model.
        json: whether to write the page's data too, beside it with the suffix `.json`.
        progress: whether to show bars.

    Returns:
        The path of the file. Where the run reported to wandb, the page is logged there too.

    Raises:
        ValueError: the folder holds no bridges, or does not say what its models are; they are others than those that
            the bridges were fitted to; a task is unknown, or there is no tokenizer to make its prompts with.

    >>> import bridges
    >>> from pathlib import Path
    >>> pair, folder = bridges.load_pair(), Path(getfixture("tmp_path"))
    >>> bridge_set = bridges.load_bridges()
    >>> bridge_set.save_pretrained(folder)
    >>> page = report(folder, dense=pair.dense, sparse=pair.sparse, tokenizer=pair.tokenizer, progress=False)
    >>> page.name, page.stat().st_size < 5_000_000
    ('index.html', True)
    """
    folder = RunFolder(run_dir)
    names = _task_names(tasks, folder)
    run = RunFile.of_folder(folder.bridges)
    known = tokenizer if tokenizer is not None else run.tokenizer() if run.tables else None
    if dense is None or sparse is None:
        run.require(folder.bridges, data=False)
        loaded = run.load_models()
        dense, sparse = loaded[0] if dense is None else dense, loaded[1] if sparse is None else sparse
    if known is None and names:
        raise ValueError(f"tokenizer=None, and none is saved with the models; pass one to make prompts of {names[0]}")
    bridge_set = BridgeSet.from_pretrained(folder.bridges)
    with frozen_pair(dense, sparse, bridge_set, check_models=True) as pair:
        missing = {} if tasks is None else _measure(folder, pair, names, known, progress)
        results = Results(
            report=folder.report(),
            circuits=folder.circuits(),
            steering=folder.steering(),
            circuits_missing={name: _not_made("circuit", folder, name) for name in names} | folder.unreached(),
            steering_missing={name: _not_made("steering", folder, name) for name in names} | missing,
        )
        data = page_data(pair, results, names, known, title=f"Bridges of {folder.path.name}", progress=progress)
    path = folder.path / PAGE if out is None else Path(out).expanduser()
    write_page(data, path)
    if json:
        write_json(path.with_suffix(".json"), data)
    log_page(folder.path, path)
    return path


def _task_names(tasks: Sequence[str] | str | None, folder: RunFolder) -> list[str]:
    if tasks is None:
        return folder.tasks()
    names = list(TASKS) if tasks == "all" else [tasks] if isinstance(tasks, str) else list(tasks)
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"tasks={unknown[0]!r} must be all, or some of {', '.join(TASKS)}")
    return names


def _not_made(what: str, folder: RunFolder, task: str) -> str:
    return f"no {what} yet: `bridges report {folder.path} --tasks {task}` makes it"


def _measure(
    folder: RunFolder, pair: ModelPair, names: Sequence[str], tokenizer: Any, progress: bool
) -> dict[str, str]:
    """Search for the circuits and channels that the folder lacks; returns why some tasks have no steering."""
    model = pair.sparse.model
    known, steered, missing = folder.circuits(), folder.steering(), dict[str, str]()
    unsearched = [name for name in names if name not in known] if isinstance(model, SparseTransformer) else []
    unsteered = [name for name in names if None in (steered.get(name) or {"one": None}).values()]
    if n := len(unsearched) + len(unsteered):
        low, high = (seconds * n // 120 for seconds in SECONDS_PER_TASK)
        sizes = f"{len(unsearched)} circuits and {len(unsteered)} sweeps to find"
        announce(f"report: {sizes}, {low} to {high} minutes for models like the bundled pair", progress)
    if unsearched and isinstance(model, SparseTransformer):
        for _ in pruned_tasks(model, unsearched, folder.path / CIRCUITS, tokenizer, False, progress=progress):
            pass  # each leaves its circuit in the folder
    known = folder.circuits()
    for name in unsteered:
        try:
            folder.save_sweeps(name, _sweeps(pair, name, known.get(name), tokenizer, progress))
        except NoChannelsFoundError as error:
            missing[name] = str(error)
    return missing


def _sweeps(
    pair: ModelPair, task: str, circuit: Circuit | None, tokenizer: Any, progress: bool
) -> dict[str, dict[str, Any]]:
    """The sweep of the one channel, and of the few, that turn both models; those of the circuit are tried first."""
    pairs: TaskPairs = task_pairs(task, tokenizer, CHOSEN_ON + PROMPTS, seed=1)
    nodes = circuit_channels(circuit, pair, task) if circuit is not None and _is_bridged(circuit, pair) else None
    chosen_on, reported = (Prompts(pair, part) for part in (pairs.rows(0, CHOSEN_ON), pairs.rows(CHOSEN_ON)))
    options, others = SearchOptions(MAX_CHANNELS, by="both"), other_tasks(task, tokenizer)
    found = find_sizes(pair, chosen_on, sample_text(pair, 0), options, progress, nodes)
    text = sample_text(pair, 0, for_search=False)
    one, few = (
        sweep_prompts(
            pair, chosen_on, reported, sizes.best, STRENGTHS, text, others, sizes.agreement, progress
        ).to_dict()
        for sizes in found
    )
    return {"one": one, "few": few}


def _is_bridged(circuit: Circuit, pair: ModelPair) -> bool:
    """Whether some node of the circuit is a channel of a bridged stream."""
    nodes = (Node(place, i) for place, indices in circuit.nodes.items() for i in indices)
    return any(isinstance(find_bridged(node, pair), BridgedNode) for node in nodes)
