"""The demo's page: one HTML file with its figures and plots."""

from __future__ import annotations

import base64
from importlib.resources import files
from pathlib import Path
from typing import Any

from bridges.bridge_report import BridgeReport
from bridges.io.files import write_text
from bridges.report.curves import BASELINES


def write_page(report: BridgeReport, steering: dict[str, Any], folder: str | Path) -> Path:
    """Write `index.html` to a folder and return its path.

    The page embeds `quality.png` and `steering.png`, which must be in the folder. `steering` is the content of
    `steering.json`.
    """
    from jinja2 import Environment, StrictUndefined

    folder = Path(folder)
    template = (files("bridges.report") / "page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    plots = {name: _data_uri(folder / f"{name}.png") for name in ("quality", "steering")}
    content = {"report": report.to_dict(), "steering": steering, "baselines": BASELINES, "plots": plots}
    write_text(folder / "index.html", environment.from_string(template).render(content))
    return folder / "index.html"


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
