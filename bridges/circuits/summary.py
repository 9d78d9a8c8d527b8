"""The table over the circuits of several tasks: sizes, losses and controls, as `summary.json` and printed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from statistics import geometric_mean
from typing import Any

from bridges.circuits.circuit import Circuit
from bridges.circuits.search import TargetNotReached

MEAN = "geometric_mean"
"""The entry of `summary.json` that is no task."""
REDIRECTED_WIDTH = 160
"""Characters of a line where the table is not printed on a terminal."""
COLUMNS = (
    *("task", "nodes", "edges", "loss", "held out, unscaled", "scale", "necessity"),
    *("shuffled labels", "permuted weights", "verdict"),
)

Row = dict[str, Any]


def found_row(circuit: Circuit) -> Row:
    """The figures of a circuit and its controls; None for controls that were not measured.

    >>> circuit = Circuit("mine", {"final.read": (3, 5)}, [], {}, scale=4.0, loss=0.1)
    >>> row = found_row(circuit)
    >>> row["nodes"], row["scale"], row["necessity"]
    (2, 4.0, None)
    """
    of = circuit.controls
    return {
        "nodes": circuit.n_nodes,
        "edges": circuit.n_edges,
        "loss": circuit.loss,
        "loss_heldout_unscaled": of.get("heldout", {}).get("loss_unscaled"),
        "scale": circuit.scale,
        "necessity": of.get("necessity", {}).get("loss"),
        "shuffled_labels": of.get("shuffled_labels"),
        "permuted_weights": of.get("permuted_weights"),
        "verdict": in_few_words(of.get("verdict", ())),
        "fingerprint": circuit.fingerprint,
    }


def failed_row(error: TargetNotReached, settings: Mapping[str, Any], fingerprint: str) -> Row:
    """What is known of a task that does not reach the target: the best loss, and what it was searched with."""
    return {
        "nodes": None,
        "edges": None,
        "loss": error.loss,
        "verdict": "target not reached",
        "message": str(error),
        "settings": dict(settings),
        "fingerprint": fingerprint,
    }


def in_few_words(verdict: Sequence[str]) -> str:
    """What stands before the colon of each line of a verdict.

    >>> in_few_words(["not necessary: without the circuit ...", "redundant: without these nodes ..."])
    'not necessary; redundant'
    """
    return "; ".join(line.split(":")[0] for line in verdict)


def with_means(rows: Mapping[str, Row]) -> dict[str, Any]:
    """The content of `summary.json`: the rows, and geometric means over the tasks that have a circuit.

    >>> of_tasks = {"a": {"nodes": 2, "edges": 1}, "b": {"nodes": 8, "edges": 4}, "c": {"nodes": None, "edges": None}}
    >>> with_means(of_tasks)["geometric_mean"]
    {'tasks': 2, 'nodes': 4.0, 'edges': 2.0}
    """
    found = [row for row in rows.values() if row["nodes"] is not None]
    means = {name: _geometric_mean([row[name] for row in found]) for name in ("nodes", "edges")}
    return {**rows, MEAN: {"tasks": len(found), **means}}


def _geometric_mean(sizes: Sequence[int]) -> float | None:
    if not sizes:
        return None
    return 0.0 if 0 in sizes else round(geometric_mean(sizes), 6)


def print_table(summary: Mapping[str, Any]) -> None:
    """Print the content of `summary.json`."""
    from rich.console import Console
    from rich.table import Table

    table = Table(caption="loss: with scaled logits; necessity: the loss with only the circuit ablated; nats")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("task", "verdict") else "right", no_wrap=name == "task")
    for task, row in summary.items():
        if task != MEAN:
            table.add_row(*_cells(task, row))
    table.add_section()
    mean = summary[MEAN]
    sizes = ["-" if mean[name] is None else f"{mean[name]:.1f}" for name in ("nodes", "edges")]
    table.add_row(f"geometric mean of {mean['tasks']}", *sizes)
    Console(width=None if sys.stdout.isatty() else REDIRECTED_WIDTH).print(table)


def _cells(task: str, row: Row) -> list[str]:
    sizes = ["-" if row[name] is None else str(row[name]) for name in ("nodes", "edges")]
    losses = [_number(row.get(name)) for name in ("loss", "loss_heldout_unscaled")]
    controls = [_size(row.get(name)) for name in ("shuffled_labels", "permuted_weights")]
    scale = "-" if row.get("scale") is None else f"{row['scale']:.2g}"
    return [task, *sizes, *losses, scale, _number(row.get("necessity")), *controls, row["verdict"]]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _size(control: Mapping[str, Any] | None) -> str:
    """The nodes of a control's circuit; where it has none, the best loss."""
    if control is None:
        return "-"
    return f"none ({control['loss']:.2f})" if control["nodes"] is None else str(control["nodes"])
