"""The demo's page: one HTML file that shows its figures and pictures."""

from __future__ import annotations

import base64
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from bridges.bridge_report import BridgeReport
from bridges.io.files import write_text


def write_page(report: BridgeReport, steering: dict[str, Any], folder: str | Path) -> Path:
    """Write `index.html` beside `quality.png` and `steering.png`, which it holds inside itself."""
    folder = Path(folder)
    template = (files("bridges.report") / "page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pictures = {name: _data_uri(folder / f"{name}.png") for name in ("quality", "steering")}
    write_text(
        folder / "index.html",
        environment.from_string(template).render(report=report.to_dict(), steering=steering, pictures=pictures),
    )
    return folder / "index.html"


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
