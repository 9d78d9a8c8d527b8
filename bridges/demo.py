"""bridges demo: bridges of the bundled pair, a circuit of its sparse model, its channels read and turned."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.bridge_report import BridgeReport
from bridges.channels.find import CHOSEN_ON
from bridges.channels.one_and_few import MAX_CHANNELS, sweep_one_and_few
from bridges.channels.prompts import frozen_pair
from bridges.channels.side_effects import other_tasks
from bridges.channels.sweep import Sweep
from bridges.circuits.circuit import Circuit
from bridges.circuits.feature_view import Feature
from bridges.circuits.features import token_names
from bridges.circuits.necessity import necessity
from bridges.circuits.pruning import prune
from bridges.config import DEFAULT_SEQ_LEN, FitConfig
from bridges.data.corpus import bundled_documents, encode_documents, pack_rows
from bridges.evaluate import evaluate
from bridges.fit import fit
from bridges.fitting.run_file import RunFile
from bridges.io.files import write_json
from bridges.io.progress import progress_bar
from bridges.models.bundled import BundledPair, load_pair
from bridges.report.page import write_page
from bridges.report.plots import quality_plot, steering_plot
from bridges.tasks.pairs import TASKS, TaskPairs, task_pairs
from bridges.views.channels import channel_steps, channel_views
from bridges.views.collect import Results, page_data, page_pairs
from bridges.views.run_folder import RunFolder

SETTINGS = FitConfig(
    steps=400,
    batch_size=8,
    lr=2e-3,
    seq_len=DEFAULT_SEQ_LEN,
    ridge=1e-3,
    decoder_attribution="effect",
    nmse_weight=0.25,
    closed_form_tokens=50_000,
    sites_per_step=1,
)
TASK = "single_double_quote"
PROMPTS = 200
"""Prompts that steering is reported on, others than those that channels are chosen on."""
TEXT_ROWS = 32
"""Rows of text that ablations are measured on: of the training split to choose channels, of the held-out to report."""
TRAIN_DOCUMENTS, HELDOUT_DOCUMENTS, SEARCH_DOCUMENTS = 3000, 300, 60
EVAL_TOKENS, KL_TOKENS, FEATURE_TOKENS = 8192, 4096, 8192
"""Held-out tokens for NMSEs and KLs of the bundled bridges, whose own report has more, and for what a channel does."""
EDGES_SHOWN, READS_SHOWN, CONTEXTS = 20, 3, 3
PAIRS_SEED = 1
CIRCUIT_LOSS = 1e-3
"""The circuit's target loss, at which the whole chain is in it; at the paper's 0.15 its first nodes may stay out."""


def load_bridges() -> BridgeSet:
    """The bridges of the bundled pair, as `bridges demo --fit` fits them; their `report` has the held-out figures.

    They are stored in half precision, which makes the package 5 MB smaller, and given in float32.

    >>> import bridges
    >>> pair, bridge_set = bridges.load_pair(), load_bridges()
    >>> bridge_set.check_models(pair.dense, pair.sparse)
    >>> bridge_set.sites
    ['0.attn', '0.mlp', '1.attn', '1.mlp', 'final']
    """
    with as_file(files("bridges") / "assets" / "bridges") as folder:
        return BridgeSet.from_pretrained(folder).float()


def demo(
    out: str | Path = "runs/demo", config: FitConfig | None = None, prompts: int = PROMPTS, progress: bool = True
) -> dict[str, Any]:
    """Measure, read and steer the bundled pair; write the files and print the figures of `bridges demo`.

    With `config`, bridges are fitted and the circuit is pruned anew; else they are the bundled ones. `out` gets the
    bridge folder, the circuit's folder, three JSON files, both plots and the page. Returns the content of
    `steering.json`.
    """
    out, console, pair = Path(out), Console(), load_pair()
    seq_len, seed = (config or SETTINGS).seq_len or DEFAULT_SEQ_LEN, (config or SETTINGS).seed
    # Without a fit only the first rows of the training split are needed, to choose channels on.
    train = demo_rows(pair, "train", SEARCH_DOCUMENTS if config is None else TRAIN_DOCUMENTS, seq_len, seed)
    heldout = demo_rows(pair, "heldout", HELDOUT_DOCUMENTS, seq_len, seed)
    bridge_set, report = measured_bridges(pair, train, heldout, config, console, progress)
    bridge_set.save_pretrained(out / "bridges")
    RunFile(sources(pair)).save(out / "bridges")  # so that `bridges steer` finds the models
    report.save(out / "report.json")
    quality_plot(report, out / "quality.png")
    console.print("\nHeld-out figures, controls in brackets", style="bold")
    console.print(str(report), highlight=False, soft_wrap=True)

    circuit = demo_circuit(pair, anew=config is not None, progress=progress)
    circuit.save(out / "circuit")
    # Others than the pairs that the circuit was found on, which have seed 0.
    pairs = task_pairs(TASK, pair.tokenizer, CHOSEN_ON + prompts, seed=PAIRS_SEED)
    console.print("\nThe circuit of closing quotes in the sparse model", style="bold")
    console.print(circuit_text(pair, circuit, pairs.rows(CHOSEN_ON)), highlight=False, soft_wrap=True, markup=False)

    read = read_circuit(pair, bridge_set, circuit, heldout, progress)
    write_json(out / "features.json", list(read.values()))
    shown = [Feature.from_dict(view).first(CONTEXTS) for node, view in read.items() if "read" in node][:READS_SHOWN]
    console.print("\nWhat its channels of the stream do on text, in both models", style="bold")
    console.print("\n\n".join(map(str, shown)), highlight=False, soft_wrap=True, markup=False)

    one, few = steer_quotes(pair, bridge_set, pairs, circuit, train[:TEXT_ROWS], heldout[:TEXT_ROWS], progress)
    steering = one.to_dict() | {"few_channels": few.to_dict()}
    write_json(out / "steering.json", steering)
    steering_plot(steering, out / "steering.png")
    console.print(f"\n{one}\n\n{few}", highlight=False, soft_wrap=True, markup=False)
    found = Results(report, {TASK: circuit}, {TASK: {"one": one.to_dict(), "few": few.to_dict()}})
    write_demo_page(pair, bridge_set, found, read, heldout, out, progress)
    written = f"\nWritten to {out}: index.html shows it all; `bridges report {out} --tasks all` adds other tasks."
    console.print(written, soft_wrap=True)
    return steering


def write_demo_page(
    pair: BundledPair,
    bridge_set: BridgeSet,
    found: Results,
    read: dict[str, dict[str, Any]],
    text: Tensor,
    out: Path,
    progress: bool,
) -> None:
    """Write `index.html`, which shows everything that the demo prints, and the prompts of all twenty tasks."""
    missing = {task: f"not in the demo; `bridges report {out} --tasks {task}` looks for it" for task in TASKS}
    found = replace(found, circuits_missing=missing, steering_missing=missing)
    with frozen_pair(pair.dense, pair.sparse, bridge_set, check_models=False) as models:
        rows = text[: FEATURE_TOKENS // text.shape[1]]
        options = {"text_source": "held-out bundled corpus", "headline": TASK, "title": "The bundled pair"}
        RunFolder(out).save_page_options(rows, **options)
        data = page_data(models, found, TASKS, pair.tokenizer, text=rows, channels=read, progress=progress, **options)
    write_page(data, out / "index.html")


def measured_bridges(
    pair: BundledPair, train: Tensor, heldout: Tensor, config: FitConfig | None, console: Console, progress: bool
) -> tuple[BridgeSet, BridgeReport]:
    """The bundled bridges, or new ones, and their figures on the held-out rows."""
    if config is None:
        console.print("Measuring the bundled bridges; --fit fits them anew.", style="bold")
        bridge_set = load_bridges()
        rows = heldout[: EVAL_TOKENS // heldout.shape[1]]
        bridge_set.report = evaluate(pair.dense, pair.sparse, bridge_set, rows, kl_tokens=KL_TOKENS, progress=progress)
        return bridge_set, bridge_set.report
    console.print("Fitting bridges for the bundled pair: closed form, then gradient steps.", style="bold")
    config = config.with_settings({"progress": progress})
    bridge_set = fit(pair.dense, pair.sparse, train, eval_data=heldout, config=config)
    assert bridge_set.report is not None, "fit always reports"
    return bridge_set, bridge_set.report


def demo_rows(pair: BundledPair, split: str, n_documents: int, seq_len: int, seed: int) -> Int[Tensor, "n seq_len"]:
    """Token rows of the first documents of a split of the bundled text."""
    documents = bundled_documents(split, seed)[:n_documents]  # pyright: ignore[reportArgumentType]
    return pack_rows(encode_documents(pair.tokenizer, documents), seq_len, pair.tokenizer.bos_token_id)


def sources(pair: BundledPair) -> dict[str, dict[str, str]]:
    """The folders of the bundled models and their tokenizer, as the tables of a `run.toml`."""
    return {
        "dense": {"path": str(pair.dense.name_or_path)},
        "sparse": {"path": str(pair.sparse.name_or_path)},
        "data": {"tokenizer": pair.tokenizer.name_or_path},
    }


def demo_circuit(pair: BundledPair, anew: bool = False, progress: bool = False) -> Circuit:
    """The circuit of closing quotes in the bundled sparse model: the bundled one, or pruned anew."""
    if anew:
        return prune(pair.sparse, TASK, tokenizer=pair.tokenizer, target_loss=CIRCUIT_LOSS, progress=progress)
    with as_file(files("bridges") / "assets" / "circuit") as folder:
        return Circuit.load(folder)


def circuit_text(pair: BundledPair, circuit: Circuit, pairs: TaskPairs) -> str:
    """The circuit's size and edges, and its figures on pairs that it was not found on."""
    fresh, without = circuit.evaluate(pair.sparse, pairs), necessity(pair.sparse, circuit, pairs)
    lines = [str(circuit)]
    lines += [f"  {source} -> {target}  {weight:+.3f}" for source, target, weight in circuit.edges[:EDGES_SHOWN]]
    if circuit.n_edges > EDGES_SHOWN:
        lines.append(f"  and {circuit.n_edges - EDGES_SHOWN} more")
    lines.append(
        f"on {len(pairs)} other pairs: the circuit alone, all else at its mean, is right in {fresh.accuracy:.0%} "
        f"(loss {fresh.loss:.3f}, {fresh.loss_unscaled:.3f} unscaled); the model without the circuit in "
        f"{without['accuracy']:.0%} (loss {without['loss']:.3f}; guessing is 0.693)"
    )
    return "\n".join(lines)


def read_circuit(
    pair: BundledPair, bridge_set: BridgeSet, circuit: Circuit, text: Tensor, progress: bool
) -> dict[str, dict[str, Any]]:
    """What each node of the circuit does on text and on the task's prompts, those of the stream in both models."""
    nodes = [f"{place}.{i}" for place, indices in circuit.nodes.items() for i in indices]
    rows, names = text[: FEATURE_TOKENS // text.shape[1]], token_names(pair.tokenizer, pair.sparse.config.vocab_size)
    pairs = page_pairs(TASK, pair.tokenizer, circuit)
    steps = channel_steps(len(nodes), rows)
    with (
        frozen_pair(pair.dense, pair.sparse, bridge_set, check_models=False) as models,
        progress_bar("channels of the circuit", steps, progress) as bar,
    ):
        return channel_views(pair.sparse, {node: [pairs] for node in nodes}, rows, names, models, bar)


def steer_quotes(
    pair: BundledPair,
    bridge_set: BridgeSet,
    pairs: TaskPairs,
    circuit: Circuit,
    search_text: Tensor,
    reported_text: Tensor,
    progress: bool = False,
) -> tuple[Sweep, Sweep]:
    """Edit the one channel that does most to both models' answers, then the few that do; those of the circuit first.

    Channels are chosen on the first `CHOSEN_ON` pairs and on other text than those reported on.
    """
    others = other_tasks(TASK, pair.tokenizer)
    with frozen_pair(pair.dense, pair.sparse, bridge_set, check_models=False) as models:
        return sweep_one_and_few(
            models, pairs, circuit, search_text, reported_text, others, progress, max_channels=MAX_CHANNELS
        )
