"""Circuits of many tasks, one after the other, in a folder that a second call continues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridges.circuits.circuit import FILE, Circuit
from bridges.circuits.controls import controls
from bridges.circuits.dense_twin import load_dense_twin
from bridges.circuits.features import sparse_transformer
from bridges.circuits.pruning import prune
from bridges.circuits.search import TargetNotReached
from bridges.circuits.settings import PruneConfig
from bridges.circuits.summary import MEAN, Row, failed_row, found_row, print_table, with_means
from bridges.io.files import read_json, write_json
from bridges.io.fingerprint import fingerprint, same_model
from bridges.models.sparse.model import SparseTransformer

SUMMARY = "summary.json"


def prune_tasks(
    sparse: Any,
    tasks: Sequence[str],
    out: Path,
    tokenizer: Any,
    with_controls: bool = True,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
    dense_twin: Any = None,
) -> dict[str, Circuit]:
    """Find the circuit of each task and print it, with the verdict of its controls; those in `out` are read instead.

    `out` gets a folder for every task, and `summary.json`, written after each: sizes, losses and controls, the best
    loss where a task does not reach the target, and the geometric means of nodes and edges. A task that has not reached
    the target is not searched again with the same settings. With several tasks in the summary it is printed as a table
    at the end. `dense_twin` is that of `controls`. Raises ValueError if `out` holds circuits of another model; of a
    single task that does not reach the target, that error.
    """
    model, found = sparse_transformer(sparse), {}
    for task, circuit, rows in pruned_tasks(
        model, tasks, out, tokenizer, with_controls, settings, progress, dense_twin
    ):
        if circuit is not None:
            found[task] = circuit
        elif len(tasks) == 1:
            raise TargetNotReached(rows[task]["message"], rows[task]["loss"])
        print(f"{task}: {rows[task]['message']}" if circuit is None else circuit)
        for line in () if circuit is None else circuit.controls.get("verdict", ()):
            print(f"  {line}")
    if len(rows := _earlier_rows(out, fingerprint(model))) > 1:
        print_table(with_means(rows))
    return found


def pruned_tasks(
    model: SparseTransformer,
    tasks: Sequence[str],
    out: Path,
    tokenizer: Any,
    with_controls: bool = True,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
    dense_twin: Any = None,
) -> Iterator[tuple[str, Circuit | None, Mapping[str, Row]]]:
    """Each task with its circuit, None where it does not reach the target, and the rows of `summary.json` so far.

    Arguments and files are those of `prune_tasks`, which prints what this finds.
    """
    own = fingerprint(model)
    twin = None if dense_twin is None else load_dense_twin(dense_twin, model, tokenizer)
    config = PruneConfig().with_settings(dict(settings or {})).recorded()
    rows = _earlier_rows(out, own)
    for task in tasks:
        circuit = _saved(out, task, own)
        if circuit is None and not _has_failed(rows.get(task), config):
            try:
                circuit = _pruned(model, task, out, tokenizer, with_controls, settings or {}, progress, twin)
            except TargetNotReached as error:
                rows[task] = failed_row(error, config, own)
        if circuit is not None:
            rows[task] = found_row(circuit)
        write_json(out / SUMMARY, with_means(rows))
        yield task, circuit, rows


def _saved(out: Path, task: str, own: str) -> Circuit | None:
    """The circuit that an earlier call has found; ValueError if it is of another model."""
    if not (out / task / FILE).is_file():
        return None
    circuit = Circuit.load(out / task)
    if not same_model(circuit.fingerprint, own):
        raise ValueError(f"out={str(out)!r} holds circuits of another model; pass another folder")
    return circuit


def _pruned(
    model: SparseTransformer,
    task: str,
    out: Path,
    tokenizer: Any,
    with_controls: bool,
    settings: Mapping[str, Any],
    progress: bool,
    dense_twin: SparseTransformer | None,
) -> Circuit:
    """Search for a circuit and save it with its controls."""
    circuit = prune(model, task, tokenizer=tokenizer, progress=progress, **settings)
    if with_controls:
        measured = controls(model, circuit, tokenizer=tokenizer, dense_twin=dense_twin, progress=progress)
        circuit = replace(circuit, controls=measured)
    circuit.save(out / task)
    return circuit


def _earlier_rows(out: Path, own: str) -> dict[str, Row]:
    """The rows of an earlier call: of the same model, and not of a circuit whose folder is gone."""
    rows = read_json(out / SUMMARY) if (out / SUMMARY).is_file() else {}
    return {
        task: row
        for task, row in rows.items()
        if task != MEAN
        and same_model(row.get("fingerprint", ""), own)
        and (row["nodes"] is None or (out / task / FILE).is_file())
    }


def _has_failed(row: Row | None, config: Mapping[str, Any]) -> bool:
    """Whether an earlier call has searched with the same settings, and found that the target is not reached."""
    return row is not None and row["nodes"] is None and row["settings"] == config
