"""report(): one HTML file of a run, which opens anywhere: its bridges, tasks, circuits and channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

from torch import nn

from bridges.bridge import BridgeSet
from bridges.channels.find import CHOSEN_ON
from bridges.channels.one_and_few import sweep_one_and_few
from bridges.channels.prompts import frozen_pair
from bridges.channels.reference_text import sample_text
from bridges.channels.search import NoChannelsFoundError
from bridges.channels.side_effects import other_tasks
from bridges.circuits.circuit import Circuit
from bridges.circuits.controls import controls
from bridges.circuits.many import pruned_tasks
from bridges.fitting.run_file import RunFile
from bridges.fitting.tracking import log_page
from bridges.io.amounts import duration
from bridges.io.files import write_json
from bridges.io.progress import announce, progress_bar
from bridges.models.loading import find_tokenizer
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.objective.pair import ModelPair
from bridges.report.page import write_page
from bridges.tasks.pairs import TASKS, task_pairs
from bridges.views.collect import Results, page_data
from bridges.views.run_folder import CIRCUITS, RunFolder

PAGE = "index.html"
PROMPTS = 64
"""Pairs of a task that steering is reported on, others than those that channels are chosen on."""


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
        tasks: names of `TASKS`, or "all". Circuits, their controls and steering that the folder lacks for them are
            searched for and measured first, and left in `circuits/` and `sweeps/`; the same call goes on with what is
            missing. By default nothing is measured but what channels do. The page always has all of `TASKS`.
        dense: the dense model, if not the one that the folder names.
        sparse: the sparse model, if not the one that the folder names.
        tokenizer: by default the one that the folder names, or that is saved with a model.
        json: whether to write the page's data too, beside it with the suffix `.data.json`.
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
    folder, path = RunFolder(run_dir), _page_path(run_dir, out)
    wanted = _task_names(tasks)
    run = RunFile.of_folder(folder.bridges)
    models, known = _models(run, folder, dense, sparse, tokenizer)
    bridge_set = BridgeSet.from_pretrained(folder.bridges)
    with frozen_pair(*models, bridge_set, check_models=True) as pair:
        if wanted:
            measure(folder, pair, wanted, known, progress)
        results = _results(folder, pair)
        options: dict[str, Any] = {"title": f"Bridges of {folder.path.resolve().name}"} | folder.page_options()
        if "fit" in run.tables:
            options |= {"text": run.heldout_rows(models).input_ids, "text_source": "held-out rows of the run"}
        data = page_data(pair, results, TASKS if known is not None else (), known, progress=progress, **options)
    write_page(data, path)
    if json:
        write_json(path.with_suffix(".data.json"), data)
    log_page(folder.path, path)
    return path


def _page_path(run_dir: str | Path, out: str | Path | None) -> Path:
    path = Path(run_dir).expanduser() / PAGE if out is None else Path(out).expanduser()
    if path.is_dir() or path.suffix == ".json":
        raise ValueError(f"out={str(path)!r} must be a file for HTML, as {path.with_suffix('.html').name}")
    return path


def _task_names(tasks: Sequence[str] | str | None) -> list[str]:
    if tasks is None:
        return []
    names = list(TASKS) if tasks == "all" else [tasks] if isinstance(tasks, str) else list(tasks)
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"tasks={unknown[0]!r} must be all, or some of {', '.join(TASKS)}")
    return names


def _models(run: RunFile, folder: RunFolder, dense: Any, sparse: Any, tokenizer: Any) -> tuple[tuple[Any, Any], Any]:
    """Both models, those given before the run's own, and the tokenizer: the one given, a given model's, the run's."""
    given = {"dense": dense, "sparse": sparse}
    named = RunFile({side: {} for side, model in given.items() if model is not None} | run.tables)
    named.require(folder.bridges, data=False)
    models = tuple(run.model(side) if model is None else model for side, model in given.items())
    if tokenizer is None:
        saved = (find_tokenizer(model) for model in given.values() if model is not None)
        tokenizer = next((one for one in saved if one is not None), None)
    if tokenizer is None and run.tables:
        tokenizer = run.tokenizer()
    return (models[0], models[1]), tokenizer


def _results(folder: RunFolder, pair: ModelPair) -> Results:
    """What the folder holds, and of every task why it lacks something."""
    circuits = {name: f"no circuit yet: `bridges report {folder.path} --tasks {name}` looks for it" for name in TASKS}
    if not isinstance(pair.sparse.model, SparseTransformer):
        circuits = dict.fromkeys(TASKS, "only a SparseTransformer has circuits")
    steering = {name: f"not measured yet: `bridges report {folder.path} --tasks {name}` does it" for name in TASKS}
    return Results(
        report=folder.report(pair.bridge_set),
        circuits=folder.circuits(pair),
        steering=folder.steering(pair.bridge_set),
        circuits_missing=circuits | folder.unreached(pair),
        steering_missing=steering | folder.unsteered(pair.bridge_set),
        left_out=folder.left_out(pair),
    )


def measure(folder: RunFolder, pair: ModelPair, tasks: Sequence[str], tokenizer: Any, progress: bool = True) -> None:
    """Search for the circuits and channels that the folder lacks for some tasks, and leave them there."""
    if tokenizer is None:
        raise ValueError(f"tokenizer=None, and none is saved with the models; pass one to make prompts of {tasks[0]}")
    known, model = folder.circuits(pair), pair.sparse.model
    steered, failed = folder.steering(pair.bridge_set), folder.unsteered(pair.bridge_set)
    bare = [name for name in tasks if name not in known or not known[name].controls]
    bare = bare if isinstance(model, SparseTransformer) else []
    unsteered = [name for name in tasks if name not in failed and None in steered.get(name, {"one": None}).values()]
    if bare or unsteered:
        sizes = f"{len(bare)} circuits or their controls and {len(unsteered)} sweeps to make"
        announce(f"report: {sizes}; the first of each tells how long the others take", progress)
    if isinstance(model, SparseTransformer):
        for name in _timed(bare, "report: circuits", progress):
            _measure_circuit(folder, model, name, known.get(name), tokenizer, progress)
    known = folder.circuits(pair)
    for name in _timed(unsteered, "report: sweeps", progress):
        folder.save_sweeps(name, _sweeps(pair, name, known.get(name), tokenizer, progress), pair.bridge_set)


def _timed(tasks: Sequence[str], description: str, progress: bool) -> Iterator[str]:
    """The tasks one by one, with a bar that tells what the others take if they take as long as those before did."""
    start = monotonic()
    with progress_bar(description, len(tasks), shown=progress and len(tasks) > 0) as bar:
        for done, task in enumerate(tasks, 1):
            yield task
            others = (monotonic() - start) / done * (len(tasks) - done)
            bar.advance(note=f"about {duration(others)} left" if others else "")


def _measure_circuit(
    folder: RunFolder, model: SparseTransformer, task: str, circuit: Circuit | None, tokenizer: Any, progress: bool
) -> None:
    """Search for a circuit where there is none, then measure its controls but for those that search again."""
    out = folder.path / CIRCUITS
    if circuit is None:
        _, circuit, _ = next(pruned_tasks(model, [task], out, tokenizer, with_controls=False, progress=progress))
    if circuit is not None and not circuit.controls:
        found = controls(model, circuit, tokenizer=tokenizer, searches=False, progress=progress)
        replace(circuit, controls=found).save(out / task)


def _sweeps(pair: ModelPair, task: str, circuit: Circuit | None, tokenizer: Any, progress: bool) -> dict[str, Any]:
    """Both sweeps of a task, or why there are none, as `sweeps/TASK.json` has them."""
    pairs = task_pairs(task, tokenizer, CHOSEN_ON + PROMPTS, seed=1)
    texts = (sample_text(pair, 0), sample_text(pair, 0, for_search=False))
    try:
        one, few = sweep_one_and_few(pair, pairs, circuit, *texts, other_tasks(task, tokenizer), progress)
    except NoChannelsFoundError as error:
        return {"missing": str(error)}
    return {"one": one.to_dict(), "few": few.to_dict()}
