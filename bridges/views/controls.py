"""The controls of a circuit, in words, each with whether it does as well as the circuit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bridges.circuits.circuit import Circuit


class ControlRow(NamedTuple):
    """One control: its name, what it measured in words, and whether the circuit's verdict holds it against it."""

    name: str
    value: str
    as_good: bool | None
    """None where no verdict judges it."""


def control_rows(circuit: Circuit) -> dict[str, Any]:
    """`controls` and `verdict` of the page's JSON; both are empty where controls were not measured.

    >>> circuit = Circuit("mine", {}, [], {}, controls={"shuffled_labels": {"nodes": None, "loss": 0.69}})
    >>> control_rows(circuit)["controls"]
    [{'name': 'shuffled labels', 'value': 'no circuit; best loss 0.690', 'as_good': False}]
    """
    found, lines = circuit.controls, list(circuit.controls.get("verdict", ()))
    rows = []
    for name, (label, words, held_against) in _CONTROLS.items():
        if name in found:
            # A verdict is a few words, a colon and figures: its words say which control it is of.
            against = any(line.startswith(held_against) for line in lines) if held_against else None
            rows.append(ControlRow(label, words(found[name]), against)._asdict())
    return {"controls": rows, "verdict": lines}


def _size(found: Mapping[str, Any]) -> str:
    if found["nodes"] is None:
        return f"no circuit; best loss {found['loss']:.3f}"
    return f"{found['nodes']} nodes, {found['edges']} edges"


def _heldout(found: Mapping[str, Any]) -> str:
    losses = f"loss {found['loss']:.3f}, {found['loss_unscaled']:.3f} with logits as they are"
    return f"{losses}; right in {found['accuracy']:.0%}"


def _necessity(found: Mapping[str, Any]) -> str:
    return (
        f"the model without the circuit: loss {found['loss']:.3f} (guessing is 0.693), right in {found['accuracy']:.0%}"
    )


def _outside(found: list[Mapping[str, float]]) -> str:
    half = next((row for row in found if row["share"] == 0.5), found[-1])
    return f"each runs with probability {half['share']:g}: mean loss {half['mean']:.3f}, worst draw {half['worst']:.3f}"


def _elsewhere(found: Mapping[str, Any]) -> str:
    tasks = found["tasks"]
    same = sum(task["whole"] == task["ablated"] for task in tasks.values())
    return f"without the circuit {same} of {len(tasks)} other tasks are as before; KL on text {found['text_kl']:.3f}"


def _interchange(found: Mapping[str, Any]) -> str:
    return f"the answer goes {found['followed']:.0%} of the way; {found['flipped']:.0%} of prompts turn"


def _other_seed(found: Mapping[str, Any]) -> str:
    return f"{_size(found)}; overlap {found['overlap']:.0%}" if "overlap" in found else _size(found)


def _twin(found: Mapping[str, Any]) -> str:
    return "; ".join(f"by {method}: {_size(found[method])}" for method in ("masks", "attribution") if method in found)


_CONTROLS: dict[str, tuple[str, Callable[[Any], str], str]] = {
    "heldout": ("new pairs", _heldout, "fails on new pairs"),
    "necessity": ("necessity", _necessity, "not necessary"),
    "interchange": ("its nodes take the other prompt's values", _interchange, "does not carry the answer"),
    "outside_kept": ("nodes outside it run", _outside, "disturbed from outside"),
    "elsewhere": ("other tasks and text", _elsewhere, ""),
    "shuffled_labels": ("shuffled labels", _size, "shuffled labels"),
    "meaningless_cue": ("a cue that means nothing", _size, "meaningless cue"),
    "permuted_weights": ("permuted weights", _size, "permuted weights"),
    "forbidden": ("these nodes forbidden", _size, "redundant"),
    "attribution": ("ranked by attribution instead", _size, ""),
    "other_seed": ("another seed", _other_seed, ""),
    "dense_twin": ("a model with dense weights", _twin, "dense twin"),
}
"""By name in `circuit.json`: the label, the figures in words, and how a verdict that holds it against the circuit
begins; "" where no verdict judges it."""
