"""The `bridges` command."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from bridges.bridge import BridgeSet
from bridges.config import FitConfig
from bridges.demo import SETTINGS, demo
from bridges.evaluate import evaluate
from bridges.fit import fit
from bridges.models.loading import find_tokenizer, load_model

app = typer.Typer(
    help="Linear bridges between a dense language model and a weight-sparse, readable one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

TABLES = {"dense", "sparse", "data", "fit"}


def main() -> None:
    """Run the command; a user's error is one line on stderr and exit status 2."""
    try:
        app()
    except (ValueError, OSError, KeyError, FloatingPointError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"bridges: {' '.join(str(message).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("bridges: stopped; the same command with --fit.resume true carries on", file=sys.stderr)
        sys.exit(130)


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Where to write; files of an earlier demo are replaced.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int, typer.Option(help="Gradient steps after the closed form.")] = SETTINGS.steps,
    prompts: Annotated[int, typer.Option(help="Held-out prompts to steer.")] = 200,
) -> None:
    """Fit bridges for the bundled pair, measure them held-out, steer one channel, and draw it all."""
    demo(out, SETTINGS.with_settings({"steps": steps}), prompts)


@app.command("fit", context_settings={"ignore_unknown_options": True})
def fit_command(
    config: Annotated[Path, typer.Argument(help="TOML with the tables [dense], [sparse], [data] and [fit].")],
    overrides: Annotated[list[str] | None, typer.Argument(help="--TABLE.NAME VALUE, over what CONFIG says.")] = None,
) -> None:
    """Fit bridges as CONFIG says; any value can be given anew: --fit.steps 100 --dense.path gpt2."""
    tables = _read(config)
    for dotted, value in _overrides(overrides or []):
        table, name = dotted
        tables.setdefault(table, {})[name] = value
    sources, data = {}, dict(tables.get("data", {}))
    for side in ("dense", "sparse"):
        arguments = dict(tables.get(side, {}))
        if "path" not in arguments:
            raise ValueError(f"[{side}] path is missing in {config}; give a folder or a hub id")
        path = arguments.pop("path")
        sources[side] = load_model(path, **arguments) if arguments else path
    settings = FitConfig.of(tables.get("fit", {}))
    print(fit(sources["dense"], sources["sparse"], **_data(data), config=settings).report)


@app.command("evaluate")
def evaluate_command(
    run_dir: Annotated[Path, typer.Argument(help="A bridge folder.")],
    dense: Annotated[str, typer.Option(help="The dense model: a folder or a hub id.")],
    sparse: Annotated[str, typer.Option(help="The sparse model; RUN_DIR/sparse where it was trained.")] = "",
    data: Annotated[str, typer.Option(help="Text files to measure on.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write the report here as JSON too.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per row.")] = 128,
) -> None:
    """Measure a bridge folder on held-out text."""
    from bridges.data.sources import load_rows

    if not data:
        raise ValueError("--data is missing: name the text files to measure on")
    bridge_set = BridgeSet.from_pretrained(run_dir)
    sparse = sparse or str(run_dir / "sparse")
    rows = load_rows(data, find_tokenizer(dense) or find_tokenizer(sparse), seq_len)
    report = evaluate(load_model(dense), load_model(sparse), bridge_set, rows)
    if out is not None:
        report.save(out)
    print(report)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"CONFIG={str(path)!r} is no file")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    if unknown := sorted(tables.keys() - TABLES):
        raise ValueError(f"{path} has the unknown table [{unknown[0]}]; known are {', '.join(sorted(TABLES))}")
    return tables


def _overrides(arguments: list[str]) -> list[tuple[tuple[str, str], Any]]:
    """`--fit.steps 100` and `--fit.steps=100` as ((table, name), value); values are TOML, else text."""
    found, rest = [], list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        table, dot, name = flag.removeprefix("--").partition(".")
        if not (flag.startswith("--") and dot and table in TABLES):
            raise ValueError(f"{flag!r} is no option; settings are given as --fit.NAME VALUE, --dense.path PATH")
        if not equals:
            if not rest:
                raise ValueError(f"{flag} needs a value")
            value = rest.pop(0)
        found.append(((table, name.replace("-", "_")), _value(value)))
    return found


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _data(table: dict[str, Any]) -> dict[str, Any]:
    """The table [data]: path, eval_path, tokenizer; without a path, sequences sampled from the dense model."""
    known = {"path": "data", "eval_path": "eval_data", "tokenizer": "tokenizer"}
    if unknown := sorted(table.keys() - known.keys()):
        raise ValueError(f"[data] {unknown[0]}={table[unknown[0]]!r} is unknown; known are {', '.join(known)}")
    arguments = {known[name]: value for name, value in table.items()}
    if "tokenizer" in arguments:
        arguments["tokenizer"] = find_tokenizer(arguments["tokenizer"])
    return arguments
