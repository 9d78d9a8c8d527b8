"""The results in a run folder that the page shows, and those that are measured for it and left there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridges.bridge_report import BridgeReport
from bridges.circuits.circuit import FILE as CIRCUIT_FILE
from bridges.circuits.circuit import Circuit
from bridges.circuits.many import SUMMARY
from bridges.io.files import read_json, write_json
from bridges.tasks.pairs import TASKS

CONFIG, REPORT = "config.json", "report.json"
CIRCUITS, SWEEPS = "circuits", "sweeps"
"""Folders of what `report` measures: a circuit's folder per task, and a JSON of sweeps per task."""


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

    def report(self) -> BridgeReport:
        """The held-out figures: those of the folder itself before those saved with the bridges."""
        for folder in (self.path, self.bridges):
            if (folder / REPORT).is_file():
                return BridgeReport.load(folder / REPORT)
        raise ValueError(
            f"run_dir={str(self.path)!r} has no report.json; `bridges evaluate {self.bridges} --out` makes it"
        )

    def circuits(self) -> dict[str, Circuit]:
        """By task: `circuit/` of the demo, then those in `circuits/`."""
        folders = [self.path / "circuit", *sorted((self.path / CIRCUITS).glob("*"))]
        found = (Circuit.load(folder) for folder in folders if (folder / CIRCUIT_FILE).is_file())
        return {circuit.task: circuit for circuit in found}

    def unreached(self) -> dict[str, str]:
        """By task, why a search in `circuits/` has found no circuit."""
        path = self.path / CIRCUITS / SUMMARY
        rows = read_json(path) if path.is_file() else {}
        return {task: row["message"] for task, row in rows.items() if isinstance(row, Mapping) and "message" in row}

    def steering(self) -> dict[str, dict[str, Any]]:
        """By task, the sweep of one channel and that of a few, or None for either.

        From `steering.json` of the demo, what `bridges steer` wrote into `steering/`, and `sweeps/`.
        """
        found: dict[str, dict[str, Any]] = {}
        for path in (self.path / "steering.json", *sorted((self.path / "steering").glob("*.json"))):
            if path.is_file():
                one = read_json(path)
                few = one.pop("few_channels", None)
                for sweep in (one, few):
                    if sweep is not None:
                        which = "few" if isinstance(sweep["channel"], list) else "one"
                        found.setdefault(sweep["task"], {"one": None, "few": None})[which] = sweep
        for path in sorted((self.path / SWEEPS).glob("*.json")):
            found[path.stem] = read_json(path)
        return found

    def save_sweeps(self, task: str, sweeps: Mapping[str, Any]) -> None:
        """Write `sweeps/TASK.json`."""
        write_json(self.path / SWEEPS / f"{task}.json", dict(sweeps))

    def tasks(self) -> list[str]:
        """The tasks of `TASKS` that there is a result of: prompts of other tasks are not in the folder."""
        found = self.circuits().keys() | self.steering().keys()
        return [task for task in TASKS if task in found]
