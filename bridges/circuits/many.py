"""Circuits of many tasks, one after the other, in a folder that a second call continues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridges.circuits.circuit import FILE, Circuit
from bridges.circuits.controls import controls
from bridges.circuits.dense_twin import load_dense_twin
from bridges.circuits.pruning import prune
from bridges.circuits.search import TargetNotReached
from bridges.io.files import write_json
from bridges.io.fingerprint import fingerprint, same_model
from bridges.models.loading import as_residual

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

    `out` gets a folder for every task and `summary.json`: sizes and losses, and the best loss where a task does not
    reach the target. `dense_twin` is that of `controls`. Raises ValueError if `out` holds circuits of another model; of
    a single task that does not reach the target, that error.
    """
    model = as_residual(sparse).model
    own, found, summary = fingerprint(model), {}, {}
    twin = None if dense_twin is None else load_dense_twin(dense_twin, model, tokenizer)
    for task in tasks:
        folder = out / task
        if (folder / FILE).is_file():
            circuit = Circuit.load(folder)
            if not same_model(circuit.fingerprint, own):
                raise ValueError(f"out={str(out)!r} holds circuits of another model; pass another folder")
        else:
            try:
                circuit = prune(model, task, tokenizer=tokenizer, progress=progress, **(settings or {}))
            except TargetNotReached as error:
                if len(tasks) == 1:
                    raise
                print(f"{task}: {error}")
                summary[task] = {"nodes": None, "edges": None, "loss": error.loss}
                continue
            if with_controls:
                measured = controls(model, circuit, tokenizer=tokenizer, dense_twin=twin, progress=progress)
                circuit = replace(circuit, controls=measured)
            circuit.save(folder)
        found[task] = circuit
        summary[task] = {"nodes": circuit.n_nodes, "edges": circuit.n_edges, "loss": circuit.loss}
        print(circuit)
        for line in circuit.controls.get("verdict", ()):
            print(f"  {line}")
    write_json(out / SUMMARY, summary)
    return found
