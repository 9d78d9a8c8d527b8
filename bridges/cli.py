"""The `bridges` command."""

from __future__ import annotations

import math
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import tomli_w
import torch
import typer
from torch import nn
from transformers.utils import logging
from typer.exceptions import Abort, TyperException

from bridges.bridge import BridgeSet
from bridges.channels.prompts import Channels
from bridges.channels.search import BUDGET, check_search
from bridges.channels.sweep import STRENGTHS, sweep
from bridges.config import FitConfig
from bridges.data.prepare import prepare
from bridges.data.rows import Rows
from bridges.data.sources import load_rows
from bridges.demo import SETTINGS, demo
from bridges.evaluate import evaluate
from bridges.fit import fit
from bridges.fitting.identity import refuse_used_folder
from bridges.fitting.trainer import Processes
from bridges.io.files import write_text
from bridges.models.loading import as_residual, find_tokenizer, load_model
from bridges.steering.delta import EntryPoint
from bridges.tasks.pairs import TASKS

app = typer.Typer(
    help="Linear bridges between a dense language model and a weight-sparse, readable one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

TABLES = {"dense", "sparse", "data", "fit"}
RUN_FILE = "run.toml"


def main() -> None:
    """Run the command; a user's error is one line on stderr and exit status 2."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # bars of single files would bury the one line that matters
    try:
        app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except (Abort, KeyboardInterrupt):
        _stop("stopped", 130)
    except TyperException as error:
        _stop(error.format_message() if hasattr(error, "format_message") else str(error), 2)  # pyright: ignore
    except (ValueError, OSError, KeyError, FloatingPointError) as error:
        _stop(str(error.args[0] if isinstance(error, KeyError) and error.args else error), 2)


def _stop(message: str, status: int) -> NoReturn:
    print(f"bridges: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Where to write; files of an earlier demo are replaced.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int, typer.Option(help="Gradient steps after the closed form.")] = SETTINGS.steps,
    prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts to steer.")] = 200,
) -> None:
    """Fit bridges for the bundled pair, measure them held-out, steer by one channel and by a few, and draw it all."""
    demo(out, SETTINGS.with_settings({"steps": steps}), prompts)


@app.command("fit", context_settings={"ignore_unknown_options": True})
def fit_command(
    config: Annotated[Path, typer.Argument(help="TOML with the tables [dense], [sparse], [data] and [fit].")],
    overrides: Annotated[list[str] | None, typer.Argument(help="--TABLE.NAME VALUE, over what CONFIG says.")] = None,
) -> None:
    """Fit bridges as CONFIG says; any value can be given anew: --fit.steps 100 --dense.path gpt2."""
    tables = _read(config)
    for (table, name), value in _overrides(overrides or []):
        tables.setdefault(table, {})[name] = value
    settings = FitConfig.from_values(tables.get("fit", {}))
    if not settings.resume:
        refuse_used_folder(settings.output_dir)
    dense, sparse = (_source(tables, side) for side in ("dense", "sparse"))
    data = _data(tables.get("data", {}))
    try:
        print(fit(dense, sparse, **data, config=settings).report)
    except KeyboardInterrupt:
        saved = settings.output_dir is not None
        _stop("stopped; the same command with --fit.resume true carries on" if saved else "stopped", 130)
    if settings.output_dir is not None:  # what `bridges evaluate` finds the models and the data by
        write_text(settings.output_dir / RUN_FILE, tomli_w.dumps(_absolute(tables, settings)))


@app.command("evaluate")
def evaluate_command(
    run_dir: Annotated[Path, typer.Argument(help="A bridge folder, as `bridges fit` writes it.")],
    dense: Annotated[str, typer.Option(help="The dense model, if not the one of the run.")] = "",
    sparse: Annotated[str, typer.Option(help="The sparse model, if not the one of the run.")] = "",
    data: Annotated[str, typer.Option(help="Text files to measure on, if not the run's held-out rows.")] = "",
    tokenizer: Annotated[str, typer.Option(help="Its folder or hub id, if not with the models.")] = "",
    seq_len: Annotated[int, typer.Option(help="Tokens per row of --data.")] = 128,
    out: Annotated[Path | None, typer.Option(help="Write the report here as JSON too.")] = None,
) -> None:
    """Measure a bridge folder on held-out data."""
    bridge_set = BridgeSet.from_pretrained(run_dir)
    tables = _read(run_dir / RUN_FILE) if (run_dir / RUN_FILE).is_file() else {}
    sources = _sources(run_dir, tables, dense, sparse)
    known = _tokenizer(tables, sources, tokenizer)
    if not data and "fit" not in tables:
        raise ValueError(f"RUN_DIR={str(run_dir)!r} does not say what data it was fitted on; pass --data")
    models = _loaded(sources)
    rows = load_rows(data, known, seq_len) if data else _heldout(tables, sources, models)
    report = evaluate(*models, bridge_set, rows)
    if out is not None:
        report.save(out)
    print(report)


@app.command("steer")
def steer_command(
    run_dir: Annotated[Path, typer.Argument(help="A bridge folder, as `bridges fit` writes it.")],
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")] = "single_double_quote",
    site: Annotated[str, typer.Option(help="The sparse site of --channel; none: search for the channels.")] = "",
    channel: Annotated[str, typer.Option(help="Channels to turn together, as 367 or 367,18.")] = "",
    at: Annotated[str, typer.Option(help="Where the edit of --channel enters: read or residual.")] = "residual",
    most: Annotated[int, typer.Option(help="How many channels to search for, 1 to 8.")] = 1,
    by: Annotated[str, typer.Option(help="Whose answer they are searched by: dense or both.")] = "dense",
    budget: Annotated[float, typer.Option(help="KL, nats, that turning them off may cost other text.")] = BUDGET,
    strengths: Annotated[str, typer.Option(help="Strengths of the edit, as 0,0.5,1.")] = "",
    n: Annotated[int, typer.Option(min=2, help="Held-out prompts to measure on.")] = 200,
    dense: Annotated[str, typer.Option(help="The dense model, if not the one of the run.")] = "",
    sparse: Annotated[str, typer.Option(help="The sparse model, if not the one of the run.")] = "",
    tokenizer: Annotated[str, typer.Option(help="Its folder or hub id, if not with the models.")] = "",
    out: Annotated[Path | None, typer.Option(help="Where to write; RUN_DIR/steering if not given.")] = None,
) -> None:
    """Turn sparse channels on a task and measure the dense model's answer, with every baseline: JSON and PNG."""
    check_search(most, by, budget)
    bridge_set = BridgeSet.from_pretrained(run_dir)
    tables = _read(run_dir / RUN_FILE) if (run_dir / RUN_FILE).is_file() else {}
    sources = _sources(run_dir, tables, dense, sparse)
    known = _tokenizer(tables, sources, tokenizer)
    chosen = Channels(site, _channels(site, channel), _entry(at)) if site or channel else most
    models = _loaded(sources)
    text = _heldout(tables, sources, models).input_ids if "fit" in tables else None
    settings: dict[str, Any] = {"by": by, "budget": budget, "n": n, "tokenizer": known, "text": text}
    found = sweep(*models, bridge_set, task, chosen, _strengths(strengths), **settings)
    folder = run_dir / "steering" if out is None else out
    found.save(folder / f"{task}.json")
    found.plot(folder / f"{task}.png")
    print(f"{found}\nWritten to {folder / task}.json and .png")


def _sources(run_dir: Path, tables: dict[str, Any], dense: str, sparse: str) -> dict[str, Any]:
    """Both models as the run names them, or as given anew; ValueError where neither says."""
    sources = {}
    for side, given in (("dense", dense), ("sparse", sparse)):
        if given:
            tables[side] = {"path": given}
        elif side not in tables:
            raise ValueError(f"RUN_DIR={str(run_dir)!r} does not say where its {side} model is; pass --{side}")
        sources[side] = _source(tables, side)
    return sources


def _loaded(sources: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Both models, on the device that a fit would use."""
    with Processes() as processes:
        dense, sparse = (load_model(source, processes.device) for source in sources.values())
    return dense, sparse


def _tokenizer(tables: dict[str, Any], sources: dict[str, Any], given: str) -> Any:
    """The tokenizer that is given, else the run's, else the one that lies with a model; None where there is none."""
    if given:
        tables["data"] = tables.get("data", {}) | {"tokenizer": given}
    places = (found for found in map(find_tokenizer, sources.values()) if found is not None)
    return _data(tables.get("data", {})).get("tokenizer") or next(places, None)


def _channels(site: str, text: str) -> tuple[int, ...]:
    if not text or not site:
        raise ValueError("--site and --channel go together; without both, channels are searched for")
    if not all(part.isdecimal() for part in text.split(",")):
        raise ValueError(f"--channel {text!r} is no number; give channels with commas between")
    return tuple(int(part) for part in text.split(","))


def _strengths(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else STRENGTHS
    except ValueError:
        raise ValueError(f"--strengths {text!r} are no numbers; give them with commas between") from None


def _entry(at: str) -> EntryPoint:
    if at not in get_args(EntryPoint):
        raise ValueError(f"--at {at!r} must be one of {', '.join(get_args(EntryPoint))}")
    return at  # pyright: ignore[reportReturnType]


def _heldout(tables: dict[str, Any], sources: dict[str, Any], models: tuple[nn.Module, nn.Module]) -> Rows:
    """The held-out rows of the run that the tables describe."""
    settings = FitConfig.from_values(tables["fit"])
    given = _data(tables.get("data", {}))
    dense, sparse = (as_residual(model) for model in models)
    data = given.get("data"), given.get("eval_data"), given.get("tokenizer")
    rows = prepare(dense, sparse, *data, (sources["dense"], sources["sparse"]), settings).heldout
    return rows.first(math.ceil(settings.eval_tokens / rows.seq_len))


def _source(tables: dict[str, Any], side: str) -> Any:
    """A model's path, or the model itself where the table says how to load it."""
    arguments = dict(tables.get(side, {}))
    if "path" not in arguments:
        raise ValueError(f"[{side}] path is missing; give a folder or a hub id")
    path = arguments.pop("path")
    if not isinstance(path, str):
        raise ValueError(f"[{side}] path={path!r} is no text; give a folder or a hub id")
    known = ("dtype", "device_map", "revision")
    if unknown := sorted(arguments.keys() - set(known)):
        raise ValueError(
            f"[{side}] {unknown[0]}={arguments[unknown[0]]!r} is unknown; known are path, {', '.join(known)}"
        )
    dtype = arguments.get("dtype", "auto")
    if dtype != "auto" and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ValueError(f"[{side}] dtype={dtype!r} is none of torch's; give float32, bfloat16, float16 or auto")
    if not arguments:
        return path
    with Processes() as processes:
        return load_model(path, processes.device, **arguments)


def _absolute(tables: dict[str, Any], settings: FitConfig) -> dict[str, Any]:
    """The tables with local paths made absolute, and the trained sparse model in place of the one it started from."""
    tables = {name: dict(table) for name, table in tables.items()}
    for table in tables.values():
        for name in ("path", "eval_path", "tokenizer"):
            if name in table and Path(table[name]).exists():
                table[name] = str(Path(table[name]).resolve())
    if settings.train_sparse and settings.output_dir is not None:
        tables["sparse"]["path"] = str((settings.output_dir / "sparse").resolve())
    return tables


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"CONFIG={str(path)!r} is no file")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    if unknown := sorted(tables.keys() - TABLES):
        raise ValueError(f"{path} has the unknown table [{unknown[0]}]; known are {', '.join(sorted(TABLES))}")
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{path} has {name}={table!r}; [{name}] must be a table")
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
        place, found = arguments["tokenizer"], find_tokenizer(arguments["tokenizer"])
        if found is None:
            raise ValueError(f"tokenizer={place!r} holds none; give a folder with tokenizer.json, or a hub id")
        arguments["tokenizer"] = found
    return arguments
