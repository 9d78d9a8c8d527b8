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
RUN_ID_FILE = "wandb_run_id"
"""In a run folder: the id of the wandb run that its rows went to."""
STEP = "fit_step"
"""The metric that counts a fit's steps in a wandb run that logs other things too, and so has steps of its own."""


class Tracker:
    """Keeps a run's rows in memory, appends them to `metrics.jsonl`, and sends them to wandb if `report_to` says so.

    A run that resumes from `step` deletes the rows after it, and a last line that is cut short, and continues the same
    wandb run. A wandb run that the caller has active is left alone: the rows go to a run of their own beside it. In a
    sweep they go to the run of the sweep's agent, which is the one that the sweep reads its metric from.
    """

    def __init__(self, output_dir: Path | None, report_to: str, settings: dict[str, Any], step: int):
        self.path = None if output_dir is None else output_dir / "metrics.jsonl"
        self.rows: list[dict[str, Any]] = [] if self.path is None else _rows_until(self.path, step)
        self.run: Any = None
        self.shared, self.plotted = False, set[str]()
        if report_to == "wandb":
            self.run, self.shared = _open_run(output_dir, settings)

    def log(self, row: dict[str, Any]) -> None:
        """Add one step's row; `row["step"]` counts from 1."""
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_text(row) + "\n")
        if self.run is not None:
            self._send({name: value for name, value in row.items() if name != "step"}, row["step"])

    def _send(self, values: dict[str, Any], step: int) -> None:
        """Log to the wandb run; to a shared one, whose own step may be far ahead, over `STEP`."""
        if not self.shared:
            self.run.log(values, step=step)
            return
        for pattern in {_pattern(name) for name in values} - self.plotted:
            self.run.define_metric(pattern, step_metric=STEP)
            self.plotted.add(pattern)
        self.run.log({**values, STEP: step})

    def finish(self, report: BridgeReport | None, folder: Path | None, plot: Path | None = None) -> None:
        """Send the report as a table, the plot as an image and the bridge folder as an artifact, and end an own run."""
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
        if not self.shared:
            self.run.finish()
        if folder is not None:
            write_text(folder / REPORT_SENT_FILE, self.run.id)

    def abort(self) -> None:
        """Mark an own wandb run as failed; a resumed run continues it."""
        if self.run is not None and not self.shared:
            self.run.finish(exit_code=1)


def log_page(run_dir: Path, page: Path) -> None:
    """Log an HTML file to the wandb run that a run folder reported to; without one, or with wandb disabled, nothing."""
    stored = _stored_id(run_dir)
    if stored is None or os.environ.get("WANDB_MODE") == "disabled":
        return
    import wandb

    run, shared = _open_run(run_dir, {})
    if run is None:
        return
    run.log({"page": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
    if not shared:
        run.finish()


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


def _open_run(output_dir: Path | None, settings: dict[str, Any]) -> tuple[Any, bool]:
    """The wandb run to log to, None where wandb is disabled; and whether it is the caller's, who ends it."""
    import wandb

    active, stored = wandb.run, _stored_id(output_dir)
    mode = os.environ.get("WANDB_MODE") or (None if active is None else _mode_of(active))
    if mode == "disabled":  # wandb.init would put a dummy in the place of the run that is active
        return None, False
    shared = active is not None and (bool(active.sweep_id) or active.id == stored)
    run = active if shared else _start_run(output_dir, settings, stored, mode)
    assert run is not None
    if shared and settings:
        run.config.update({"fit": settings}, allow_val_change=True)
    if output_dir is not None:
        write_text(output_dir / RUN_ID_FILE, run.id)
    return run, shared


def _mode_of(run: Any) -> str:
    return "disabled" if run.disabled else "offline" if run.offline else "online"


def _pattern(metric: str) -> str:
    """What wandb knows a metric's whole group by: `train/*` for `train/loss`."""
    group, slash, _ = metric.partition("/")
    return f"{group}/*" if slash else metric


def _start_run(output_dir: Path | None, settings: dict[str, Any], stored: str | None, mode: str | None) -> Any:
    """Start or continue an own wandb run; beside one that is active, in its project and account.

    Offline, with a line on stderr, if neither an account nor a mode is set. In a sweep wandb gives the run its id.
    """
    import wandb

    active = wandb.run
    in_sweep = bool(wandb.setup().settings.sweep_id)
    if mode is None and not wandb.login(prompt=False, verify=False):
        print(
            "wandb: no account and no WANDB_MODE set; the run is recorded offline, `wandb sync` sends it later",
            file=sys.stderr,
        )
        mode = "offline"
    project = os.environ.get("WANDB_PROJECT") or (None if active is None else active.project)
    place: dict[str, Any] = {
        "project": project or "bridges",
        "entity": active.entity if active is not None and active.entity else None,
        "id": stored or uuid.uuid4().hex[:12],
    }
    return wandb.init(
        **({} if in_sweep else place),
        resume="allow",
        reinit="create_new",  # any other value ends or returns the run that is active
        mode=mode,  # pyright: ignore[reportArgumentType]
        dir=None if output_dir is None else str(output_dir),
        config=settings,
        settings=wandb.Settings(console="off", silent=True),
    )


def _stored_id(output_dir: Path | None) -> str | None:
    """The id of the wandb run that a run folder's rows went to, None before there is one."""
    path = None if output_dir is None else output_dir / RUN_ID_FILE
    return path.read_text(encoding="utf-8").strip() if path is not None and path.is_file() else None
