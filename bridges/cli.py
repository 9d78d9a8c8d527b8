"""The `bridges` command."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import torch
import typer
from transformers.utils import logging
from typer.exceptions import Abort, TyperException

from bridges.bridge import BridgeSet
from bridges.channels.feature import feature
from bridges.channels.prompts import Channels
from bridges.channels.search import BUDGET, check_search
from bridges.channels.sweep import STRENGTHS, sweep
from bridges.circuits.feature_view import Feature
from bridges.circuits.many import prune_tasks
from bridges.config import DEFAULT_SEQ_LEN
from bridges.data.sources import load_rows
from bridges.demo import SETTINGS, demo
from bridges.evaluate import evaluate
from bridges.fit import fit
from bridges.fitting.identity import refuse_used_folder
from bridges.fitting.precision import refuse_other_mixed_precision
from bridges.fitting.processes import is_main_process
from bridges.fitting.run_file import PRETRAIN_TABLES, TABLES, RunFile
from bridges.fitting.watch import ProcessLost
from bridges.models.loading import find_tokenizer
from bridges.pretrain import pretrain
from bridges.sparsity.settings import PretrainConfig
from bridges.steering.delta import EntryPoint
from bridges.tasks.pairs import TASKS
from bridges.views.report import report

app = typer.Typer(
    help="Linear bridges between a dense language model and a weight-sparse, readable one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # rich's own markup would take [dense] for a style
)

RunDir = Annotated[Path, typer.Argument(help="A bridge folder, as `bridges fit` writes it.")]
Dense = Annotated[str, typer.Option(help="The dense model, if not the one of the run.")]
Sparse = Annotated[str, typer.Option(help="The sparse model, if not the one of the run.")]
Tokenizer = Annotated[str, typer.Option(help="Its folder or hub id, if not saved with the models.")]


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
    except (ValueError, OSError, KeyError, FloatingPointError, ProcessLost) as error:
        _stop(str(error.args[0] if isinstance(error, KeyError) and error.args else error), 2)


def _stop(message: str, status: int) -> NoReturn:
    print(f"bridges: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Where to write; files of an earlier demo are replaced.")] = Path(
        "runs/demo"
    ),
    fit_anew: Annotated[
        bool, typer.Option("--fit", help="Fit bridges and find the circuit anew; takes minutes.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=0, help="Fit them anew with so many gradient steps.")] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts to steer.")] = 200,
) -> None:
    """Measure the bundled pair's bridges held-out, steer by one channel and by a few, and draw it all."""
    steps = SETTINGS.steps if steps is None and fit_anew else steps
    demo(out, None if steps is None else SETTINGS.with_settings({"steps": steps}), prompts)


@app.command("fit", context_settings={"ignore_unknown_options": True})
def fit_command(
    config: Annotated[Path, typer.Argument(help="TOML with the tables [dense], [sparse], [data] and [fit].")],
    overrides: Annotated[list[str] | None, typer.Argument(help="--TABLE.NAME VALUE, over what CONFIG says.")] = None,
) -> None:
    """Fit bridges as CONFIG says; any value can be given anew: --fit.steps 100 --dense.path gpt2."""
    run = RunFile.read(config).with_values(_overrides(overrides or []))
    settings = run.settings()
    if not settings.resume:
        refuse_used_folder(settings.output_dir)
    refuse_other_mixed_precision(settings)
    dense, sparse = run.model("dense"), run.model("sparse")
    data = run.data_arguments()
    try:
        report_of_fit = fit(dense, sparse, **data, config=settings).report
    except KeyboardInterrupt:
        saved = settings.output_dir is not None
        _stop("stopped; the same command with --fit.resume true carries on" if saved else "stopped", 130)
    if not is_main_process():
        return
    print(report_of_fit)
    if settings.output_dir is not None:  # what `bridges evaluate` finds the models and the data by
        run.save(settings.output_dir)


@app.command("pretrain", context_settings={"ignore_unknown_options": True})
def pretrain_command(
    config: Annotated[Path, typer.Argument(help="TOML with the tables [sparse], [teacher], [data] and [pretrain].")],
    overrides: Annotated[list[str] | None, typer.Argument(help="--TABLE.NAME VALUE, over what CONFIG says.")] = None,
) -> None:
    """Train a weight-sparse model by itself as CONFIG says; [sparse] holds a path, or the shape of a new model."""
    run = RunFile.read(config, PRETRAIN_TABLES).with_values(_overrides(overrides or [], PRETRAIN_TABLES))
    settings = PretrainConfig.from_values(run.tables.get("pretrain", {}))
    if settings.output_dir is None:
        raise ValueError("[pretrain] output_dir is missing; give the folder to write the model to")
    if not settings.resume:
        refuse_used_folder(settings.output_dir)
    refuse_other_mixed_precision(settings)
    torch.manual_seed(settings.seed)  # of a new model's weights
    teacher = run.model("teacher") if "teacher" in run.tables else None
    try:
        pretrain(run.new_or_saved_sparse(), **run.data_arguments(), teacher=teacher, config=settings)
    except KeyboardInterrupt:
        _stop("stopped; the same command with --pretrain.resume true carries on", 130)
    if is_main_process():
        print(f"Written to {settings.output_dir / 'sparse'}")


@app.command("circuit")
def circuit_command(
    model: Annotated[str, typer.Argument(help="A sparse model's folder or hub id, or a folder of `bridges fit`.")],
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}, or all.")] = "",
    node: Annotated[
        str,
        typer.Option("--feature", help="Look at a node instead, as 1.attn.read.118; --task: on its prompts too."),
    ] = "",
    out: Annotated[Path, typer.Option(help="Where to write; circuits that are there are not searched anew.")] = Path(
        "runs/circuits"
    ),
    with_controls: Annotated[bool, typer.Option("--controls/--no-controls", help="Measure the controls too.")] = True,
    target_loss: Annotated[float, typer.Option(help="Nats that the circuit's loss may be.")] = 0.15,
    steps: Annotated[int, typer.Option(help="Training steps of the masks.")] = 200,
    method: Annotated[str, typer.Option(help="How nodes are ranked: masks, which learn, or attribution.")] = "masks",
    dense_twin: Annotated[
        str, typer.Option(help="A model of the same class with dense weights; its circuits' sizes are a control.")
    ] = "",
    seeds: Annotated[int, typer.Option(help="Searches; the smallest circuit counts.")] = 1,
    rounds: Annotated[int, typer.Option(help="Circuits in a row, each without the last one's nodes; their union.")] = 1,
    tokenizer: Tokenizer = "",
) -> None:
    """Find the circuit of a task in a weight-sparse model, with its controls; or look at what one node does."""
    run = RunFile.of_folder(Path(model))
    source = run.model_path("sparse") if "sparse" in run.tables else model
    known = RunFile({"data": {"tokenizer": tokenizer}}).tokenizer() if tokenizer else find_tokenizer(source)
    known = run.tokenizer() if known is None and "sparse" in run.tables else known
    if node:
        print(_look_at(node, model, run, source, task, known))
        return
    if task not in (*TASKS, "all"):
        raise ValueError(f"--task {task!r} must be all, or one of {', '.join(TASKS)}")
    if dense_twin and not with_controls:
        raise ValueError(f"--dense-twin {dense_twin!r} is one of the controls; leave out --no-controls")
    settings = {"target_loss": target_loss, "steps": steps, "seeds": seeds, "method": method, "rounds": rounds}
    tasks = TASKS if task == "all" else (task,)
    prune_tasks(source, tasks, out, known, with_controls, settings, dense_twin=dense_twin or None)


@app.command("evaluate")
def evaluate_command(
    run_dir: RunDir,
    dense: Dense = "",
    sparse: Sparse = "",
    data: Annotated[str, typer.Option(help="Text files to measure on, if not the run's held-out rows.")] = "",
    tokenizer: Tokenizer = "",
    seq_len: Annotated[int, typer.Option(help="Tokens per row of --data.")] = DEFAULT_SEQ_LEN,
    out: Annotated[Path | None, typer.Option(help="Write the report here as JSON too.")] = None,
) -> None:
    """Measure a bridge folder on held-out data."""
    bridge_set = BridgeSet.from_pretrained(run_dir)
    run = _run_of(run_dir, dense, sparse, tokenizer)
    run.require(run_dir, data=not data)
    known, models = run.tokenizer(), run.load_models()
    rows = load_rows(data, known, seq_len) if data else run.heldout_rows(models)
    report = evaluate(*models, bridge_set, rows)
    if out is not None:
        report.save(out)
    print(report)


@app.command("steer")
def steer_command(
    run_dir: RunDir,
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")] = "single_double_quote",
    site: Annotated[str, typer.Option(help="The sparse site of --channel; none: search for the channels.")] = "",
    channel: Annotated[str, typer.Option(help="Channels to edit together, as 367 or 367,18.")] = "",
    at: Annotated[str, typer.Option(help="Where the edit of --channel enters: read or residual.")] = "residual",
    most: Annotated[int, typer.Option(help="How many channels to search for, 1 to 8.")] = 1,
    by: Annotated[str, typer.Option(help="Whose answer they are searched by: dense or both.")] = "dense",
    budget: Annotated[float, typer.Option(help="KL, nats, that ablating them may cost on other text.")] = BUDGET,
    strengths: Annotated[str, typer.Option(help="Strengths of the edit, as 0,0.5,1.")] = "",
    n: Annotated[int, typer.Option(min=2, help="Held-out prompts to measure on.")] = 200,
    dense: Dense = "",
    sparse: Sparse = "",
    tokenizer: Tokenizer = "",
    out: Annotated[Path | None, typer.Option(help="Where to write; RUN_DIR/steering if not given.")] = None,
) -> None:
    """Edit sparse channels on a task and measure the dense model's answer, with every baseline: JSON and PNG."""
    check_search(most, by, budget)
    bridge_set = BridgeSet.from_pretrained(run_dir)
    run = _run_of(run_dir, dense, sparse, tokenizer)
    run.require(run_dir, data=False)
    known = run.tokenizer()
    chosen = Channels(site, _channels(site, channel), _entry_point(at)) if site or channel else most
    models = run.load_models()
    text = run.heldout_rows(models).input_ids if "fit" in run.tables else None
    settings: dict[str, Any] = {"by": by, "budget": budget, "n": n, "tokenizer": known, "text": text}
    found = sweep(*models, bridge_set, task, chosen, _strengths(strengths), **settings)
    folder = run_dir / "steering" if out is None else out
    found.save(folder / f"{task}.json")
    found.plot(folder / f"{task}.png")
    print(f"{found}\nWritten to {folder / task}.json and .png")


@app.command("report")
def report_command(
    run_dir: Annotated[Path, typer.Argument(help="A folder of `bridges fit` or `bridges demo`.")],
    tasks: Annotated[
        str, typer.Option(help="Tasks with commas between, or all; what the folder lacks of them is measured first.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="The file to write; RUN_DIR/index.html if not given.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Write the page's data beside it as JSON.")] = False,
    dense: Dense = "",
    sparse: Sparse = "",
    tokenizer: Tokenizer = "",
) -> None:
    """Write one HTML file that shows a run: its bridges, tasks, circuits, and what channels mean in both models."""
    names = None if not tasks else "all" if tasks == "all" else tasks.split(",")
    known = RunFile({"data": {"tokenizer": tokenizer}}).tokenizer() if tokenizer else None
    models = {"dense": dense or None, "sparse": sparse or None, "tokenizer": known}
    print(f"Written to {report(run_dir, out=out, tasks=names, json=json, **models)}")


def _look_at(node: str, folder: str, run: RunFile, source: str, task: str, tokenizer: Any) -> Feature:
    """What a node does; in the dense model too, where the folder is that of a fit."""
    if "dense" not in run.tables:
        return feature(source, node, task=task or None, tokenizer=tokenizer)
    bridge_set, (dense, sparse) = BridgeSet.from_pretrained(folder), run.load_models()
    return feature(sparse, node, dense=dense, bridge_set=bridge_set, task=task or None, tokenizer=tokenizer)


def _run_of(run_dir: Path, dense: str, sparse: str, tokenizer: str) -> RunFile:
    """The run's tables, with the models and the tokenizer that are given in place of its own."""
    run = RunFile.of_folder(run_dir)
    given: dict[str, dict[str, Any]] = {
        side: {"path": path} for side, path in (("dense", dense), ("sparse", sparse)) if path
    }
    run = RunFile({**run.tables, **given})
    return run.with_values([("data", "tokenizer", tokenizer)]) if tokenizer else run


def _channels(site: str, text: str) -> tuple[int, ...]:
    if not text or not site:
        raise ValueError("--site and --channel go together; without both, channels are searched for")
    if not all(part.isdecimal() for part in text.split(",")):
        raise ValueError(f"--channel {text!r} must be channel numbers with commas between, as 367,18")
    return tuple(int(part) for part in text.split(","))


def _strengths(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else STRENGTHS
    except ValueError:
        raise ValueError(f"--strengths {text!r} must be numbers with commas between, as 0,0.5,1") from None


def _entry_point(at: str) -> EntryPoint:
    if at not in get_args(EntryPoint):
        raise ValueError(f"--at {at!r} must be one of {', '.join(get_args(EntryPoint))}")
    return at  # pyright: ignore[reportReturnType]


def _overrides(arguments: list[str], tables: Sequence[str] = TABLES) -> list[tuple[str, str, Any]]:
    """`--fit.steps 100` and `--fit.steps=100` as (table, key, value); values are TOML, else text."""
    found, rest = [], list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        table, dot, name = flag.removeprefix("--").partition(".")
        if not (flag.startswith("--") and dot and table in tables):
            raise ValueError(
                f"{flag!r} is not an option; settings are given as --{tables[-1]}.NAME VALUE, --sparse.path PATH"
            )
        if not equals:
            if not rest:
                raise ValueError(f"{flag} needs a value")
            value = rest.pop(0)
        found.append((table, name.replace("-", "_"), _toml_value(value)))
    return found


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
