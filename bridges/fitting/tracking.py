"""The log of a run: `metrics.jsonl` in the run folder, and Weights & Biases where `report_to` says so."""

from __future__ import annotations

import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any

from bridges.bridge_report import BridgeReport
from bridges.io.files import json_text, replacing, write_text

REPORT_SENT_FILE = "wandb_report_sent"
"""A run folder has this file once its final report has been sent to wandb; a run may be killed before that."""


class Tracker:
    """Keeps a run's rows in memory, appends them to `metrics.jsonl`, and sends them to wandb if `report_to` says so.

    A run that resumes from `step` deletes the rows after it, and a last line that is cut short, and continues the same
    wandb run.
    """

    def __init__(self, output_dir: Path | None, report_to: str, settings: dict[str, Any], step: int):
        self.path = None if output_dir is None else output_dir / "metrics.jsonl"
        self.rows: list[dict[str, Any]] = [] if self.path is None else _rows_until(self.path, step)
        self.run = None
        if report_to == "wandb":
            self.run = _start_run(output_dir, settings)

    def log(self, row: dict[str, Any]) -> None:
        """Add one step's row; `row["step"]` counts from 1."""
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_text(row) + "\n")
        if self.run is not None:
            self.run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def finish(self, report: BridgeReport | None, folder: Path | None, plot: Path | None = None) -> None:
        """End the wandb run: send the report as a table, the plot as an image and the bridge folder as an artifact."""
        if self.run is None:
            return
        import wandb

        if report is not None:
            sites = report.to_dict()["sites"]
            columns = list(sites[0])
            table = wandb.Table(columns=columns, data=[[site[name] for name in columns] for site in sites])
            self.run.log({"report": table})
            self.run.summary.update(report.flat("final"))
        if plot is not None:
            self.run.log({"quality": wandb.Image(str(plot))})
        if folder is not None:
            artifact = wandb.Artifact(f"bridges-{self.run.id}", "bridges", metadata=_artifact_metadata(report))
            for name in ("config.json", "bridges.safetensors", "report.json", "history.json", "README.md"):
                if (folder / name).is_file():
                    artifact.add_file(str(folder / name))
            self.run.log_artifact(artifact)
        self.run.finish()
        if folder is not None:
            write_text(folder / REPORT_SENT_FILE, self.run.id)

    def abort(self) -> None:
        """Mark the wandb run as failed; a resumed run continues it."""
        if self.run is not None:
            self.run.finish(exit_code=1)


def _artifact_metadata(report: BridgeReport | None) -> dict[str, Any]:
    return {} if report is None else report.flat("final") | {"tokens": report.tokens}


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows up to `step`; later ones are deleted from the file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for line in lines:
        if not line.endswith("}"):
            break  # only the last line can be cut short, by a kill while it was written
        row = json.loads(line)
        if row["step"] > step:
            break
        rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text("".join(json_text(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def _start_run(output_dir: Path | None, settings: dict[str, Any]) -> Any:
    """Start or continue the wandb run; offline, with a line on stderr, if neither an account nor WANDB_MODE is set."""
    import wandb

    mode = os.environ.get("WANDB_MODE") or None
    if mode is None and not wandb.login(prompt=False, verify=False):
        print(
            "wandb: no account and no WANDB_MODE set; the run is recorded offline, `wandb sync` sends it later",
            file=sys.stderr,
        )
        mode = "offline"
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", "bridges"),
        id=_run_id(output_dir),
        resume="allow",
        mode=mode,  # pyright: ignore[reportArgumentType]
        dir=None if output_dir is None else str(output_dir),
        config=settings,
        settings=wandb.Settings(console="off", silent=True),
    )


def _run_id(output_dir: Path | None) -> str:
    """The id of the wandb run, kept in the run folder from the start, so that a resumed run continues the same one."""
    if output_dir is None:
        return uuid.uuid4().hex[:12]
    path = output_dir / "wandb_run_id"
    if not path.is_file():
        write_text(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8").strip()
