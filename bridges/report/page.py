"""The report page: one HTML file that holds its figures, its style and its script, and asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from bridges.io.files import write_text

FORMAT = 1
"""Of the data; the page's script reads no other."""


def write_page(data: dict[str, Any], path: str | Path) -> Path:
    """Write `render_page` of the data to a file, which is returned.

    ValueError if the data holds NaN or an infinity, or is of another format.
    """
    path = Path(path)
    write_text(path, render_page(data))
    return path


def render_page(data: dict[str, Any]) -> str:
    """Render the page as HTML. `data` is what `web/src/types.js` describes as PageData: plain values, for JSON.

    ValueError if the data holds NaN or an infinity, which JSON has no word for, or is of another format.

    >>> page = render_page({"format": 1, "title": "Two models", "tasks": []})
    >>> "<title>Two models</title>" in page
    True
    """
    from jinja2 import Environment, StrictUndefined

    if data.get("format") != FORMAT:
        raise ValueError(f"data['format']={data.get('format')!r} must be {FORMAT}: the page reads no other")
    folder = files("bridges.report")
    template = (folder / "page.html.jinja").read_text(encoding="utf-8")
    script, style = ((folder / "assets" / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    content = {"title": data["title"], "policy": content_policy(script, style), "script": script, "style": style}
    return environment.from_string(template).render(content | {"data": _json(data)})


def content_policy(script: str, style: str) -> str:
    """Return the Content-Security-Policy that allows this script and this style, and nothing else.

    >>> content_policy("", "")[:50]
    "default-src 'none'; script-src 'sha256-47DEQpj8HBS"
    """
    allowed = [f"{name}-src '{_hash(text)}'" for name, text in (("script", script), ("style", style))]
    return "; ".join(["default-src 'none'", *allowed])


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(data: dict[str, Any]) -> str:
    try:
        text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise ValueError(f"data has a figure that JSON cannot hold; give null in its place ({error})") from None
    # So no token of a model can end the script element, or open a comment in it.
    return text.replace("<", "\\u003c")
