"""The results in a run folder that the page shows, and those that are measured for it and left there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.bridge_report import BridgeReport
from bridges.circuits.circuit import FILE as CIRCUIT_FILE
from bridges.circuits.circuit import Circuit
from bridges.circuits.many import SUMMARY
from bridges.io.files import read_json, write_json
from bridges.io.fingerprint import fingerprint, same_model
from bridges.objective.pair import ModelPair
from bridges.tasks.pairs import TASKS

CONFIG, REPORT = "config.json", "report.json"
PAGE_OPTIONS = "page.json"
"""What the demo gave `page_data` beside its results, so that the page can be drawn anew with the same."""
CIRCUITS, SWEEPS = "circuits", "sweeps"
"""Folders of what `report` measures: a circuit's folder per task, and a JSON of sweeps per task."""
OWN_TASK = "a task of your own: its prompts are not in the folder"


class RunFolder:
    """A folder of `bridges fit` or `bridges demo`, with circuits and sweeps where some were made.

    Raises ValueError if it holds no bridges.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        places = [self.path, self.path / "bridges"]  # `bridges demo` puts its bridges in a folder of their own
        found = [place for place in places if (place / CONFIG).is_file()]
        if not found:
            raise ValueError(
                f"run_dir={str(path)!r} holds no bridges; give a folder of `bridges fit` or `bridges demo`"
            )
        self.bridges = found[0]

    def report(self, bridge_set: BridgeSet) -> BridgeReport:
        """The held-out figures: those of the folder itself before those saved with the bridges."""
        for path in (self.path / REPORT, self.bridges / REPORT):
            if path.is_file():
                report = BridgeReport.load(path)
                if unknown := {site.name for site in report.sites} - set(bridge_set.sites):
                    raise ValueError(f"{path} has the site {sorted(unknown)[0]!r}, at which there is no bridge")
                return report
        path = self.bridges / REPORT
        raise ValueError(f"{path} is missing; `bridges evaluate {self.bridges} --out {path}` makes it")

    def circuits(self, pair: ModelPair) -> dict[str, Circuit]:
        """By task: `circuit/` of the demo, then those in `circuits/`; ValueError names one of another model."""
        folders = [self.path / "circuit", *sorted((self.path / CIRCUITS).glob("*"))]
        own, found = fingerprint(pair.sparse.model), {}
        for folder in folders:
            if (folder / CIRCUIT_FILE).is_file():
                circuit = Circuit.load(folder)
                if not same_model(circuit.fingerprint, own):
                    raise ValueError(f"{folder} holds a circuit of another model; remove it, or pass its model")
                found[circuit.task] = circuit
        return found

    def unreached(self, pair: ModelPair) -> dict[str, str]:
        """By task, why a search in `circuits/` has found no circuit of this model."""
        path = self.path / CIRCUITS / SUMMARY
        rows, own = read_json(path) if path.is_file() else {}, fingerprint(pair.sparse.model)
        return {
            task: row["message"]
            for task, row in rows.items()
            if isinstance(row, Mapping) and "message" in row and same_model(row.get("fingerprint", ""), own)
        }

    def steering(self, bridge_set: BridgeSet) -> dict[str, dict[str, Any]]:
        """By task, the sweep of one channel and that of a few, or None for either.

        From `sweeps/`, which `report` has measured with these bridges; before them from `steering.json` of the demo and
        from what `bridges steer` wrote into `steering/`. Raises ValueError that names a file which is no sweep.
        """
        own, found = fingerprint(bridge_set), {}
        for path in sorted((self.path / SWEEPS).glob("*.json")):
            saved = read_json(path)
            if same_model(saved.get("bridges", ""), own) and "missing" not in saved:
                found[path.stem] = {which: saved[which] for which in ("one", "few")}
        for path in (self.path / "steering.json", *sorted((self.path / "steering").glob("*.json"))):
            if path.is_file():
                sweep = read_json(path)
                if not isinstance(sweep, dict) or not {"task", "site", "channel", "strengths"} <= sweep.keys():
                    raise ValueError(f"{path} is no result of `bridges steer`; remove it")
                both = found.setdefault(sweep["task"], {"one": None, "few": None})
                if few := sweep.pop("few_channels", None):  # the demo has both in one file
                    both["few"] = few
                both["few" if isinstance(sweep["channel"], list) else "one"] = sweep
        return found

    def unsteered(self, bridge_set: BridgeSet) -> dict[str, str]:
        """By task, why a search with these bridges has found no channels."""
        own = fingerprint(bridge_set)
        saved = {path.stem: read_json(path) for path in sorted((self.path / SWEEPS).glob("*.json"))}
        return {
            task: found["missing"]
            for task, found in saved.items()
            if "missing" in found and same_model(found.get("bridges", ""), own)
        }

    def save_sweeps(self, task: str, found: Mapping[str, Any], bridge_set: BridgeSet) -> None:
        """Write `sweeps/TASK.json`: `one` and `few`, or `missing`, why there are none; and whose bridges they are."""
        write_json(self.path / SWEEPS / f"{task}.json", {**found, "bridges": fingerprint(bridge_set)})

    def save_page_options(self, text: Int[Tensor, "rows seq"], **options: str) -> None:
        """Write the token rows that channels are shown on, and other options of `page_data`."""
        write_json(self.path / PAGE_OPTIONS, {**options, "text": text.tolist()})

    def page_options(self) -> dict[str, Any]:
        """What `save_page_options` has written, as arguments of `page_data`; nothing where it has not."""
        path = self.path / PAGE_OPTIONS
        if not path.is_file():
            return {}
        options = read_json(path)
        return {**options, "text": torch.tensor(options["text"], dtype=torch.long)}

    def left_out(self, pair: ModelPair) -> dict[str, str]:
        """The user's own tasks that there are results of."""
        tasks = self.circuits(pair).keys() | self.steering(pair.bridge_set).keys()
        return {task: OWN_TASK for task in sorted(tasks - set(TASKS))}
