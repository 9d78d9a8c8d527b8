"""bridges demo: fit bridges for the bundled pair, measure them, steer the dense model by one channel and by a few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w
from rich.console import Console
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.channels.find import CHOSEN_ON, find
from bridges.channels.prompts import frozen_pair, prompts_of, text_of
from bridges.channels.search import MOST
from bridges.channels.side_effects import other_tasks
from bridges.channels.sweep import STRENGTHS, Sweep, sweep_prompts
from bridges.config import DEFAULT_SEQ_LEN, FitConfig
from bridges.data.corpus import bundled_documents, encode_documents, pack_rows
from bridges.fit import fit
from bridges.io.files import write_json, write_text
from bridges.models.bundled import Pair, load_pair
from bridges.report.page import write_page
from bridges.report.plots import quality_plot, steering_plot
from bridges.tasks.pairs import task_pairs

SETTINGS = FitConfig(
    steps=400,
    batch_size=8,
    lr=1e-3,
    seq_len=DEFAULT_SEQ_LEN,
    ridge=1e-3,
    nmse_weight=0.25,
    interchange_weight=0.05,
    closed_form_tokens=160_000,
    sites_per_step=1,
)
TASK = "single_double_quote"
REPORTED = 200
SIDE_EFFECT_ROWS = 32
TRAIN_DOCUMENTS, HELDOUT_DOCUMENTS = 3000, 300


def demo(out: str | Path = "runs/demo", config: FitConfig = SETTINGS, prompts: int = REPORTED) -> dict[str, Any]:
    """Write everything that `bridges demo` shows under `out`; returns the content of `steering.json`."""
    out, console = Path(out), Console()
    pair = load_pair()
    console.print("Fitting bridges for the bundled pair: closed form, then a short polish.", style="bold")
    train, heldout = (
        demo_rows(pair, split, n, config.seq_len or DEFAULT_SEQ_LEN, config.seed)
        for split, n in (("train", TRAIN_DOCUMENTS), ("heldout", HELDOUT_DOCUMENTS))
    )
    bridge_set = fit(pair.dense, pair.sparse, train, eval_data=heldout, config=config)
    bridge_set.save_pretrained(out / "bridges")
    write_text(out / "bridges" / "run.toml", tomli_w.dumps(sources(pair)))  # so that `bridges steer` finds the models
    assert bridge_set.report is not None, "fit always reports"
    bridge_set.report.save(out / "report.json")
    quality_plot(bridge_set.report, out / "quality.png")
    console.print("\nHeld-out figures, controls in brackets", style="bold")
    console.print(str(bridge_set.report), highlight=False, soft_wrap=True)
    one, few = steer_quotes(pair, bridge_set, prompts, train[:SIDE_EFFECT_ROWS], heldout[:SIDE_EFFECT_ROWS])
    steering = one.to_dict() | {"few_channels": few.to_dict()}
    write_json(out / "steering.json", steering)
    steering_plot(steering, out / "steering.png")
    write_page(bridge_set.report, steering, out)
    console.print(f"\n{one}\n\n{few}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"\nWritten to {out}: index.html shows it all.")
    return steering


def demo_rows(pair: Pair, split: str, n_documents: int, seq_len: int, seed: int) -> Tensor:
    """Rows [n, seq_len] of the first documents of a split of the bundled text."""
    documents = bundled_documents(split, seed)[:n_documents]  # pyright: ignore[reportArgumentType]
    return pack_rows(encode_documents(pair.tokenizer, documents), seq_len, pair.tokenizer.bos_token_id)


def sources(pair: Pair) -> dict[str, dict[str, str]]:
    """Where the bundled models and their tokenizer lie, as the tables of a run."""
    return {
        "dense": {"path": str(pair.dense.name_or_path)},
        "sparse": {"path": str(pair.sparse.name_or_path)},
        "data": {"tokenizer": pair.tokenizer.name_or_path},
    }


def steer_quotes(pair: Pair, bridge_set: BridgeSet, prompts: int, seen: Tensor, text: Tensor) -> tuple[Sweep, Sweep]:
    """The edit of the channel that does most to the dense model's answer, and of the few that turn both models.

    Chosen within a budget on text that was `seen` in training, reported on `text`.
    """
    pairs = task_pairs(TASK, pair.tokenizer, CHOSEN_ON + prompts)
    with frozen_pair(pair.dense, pair.sparse, bridge_set, check_models=False) as models:
        chosen_on, reported = (prompts_of(models, rows) for rows in (pairs.rows(0, CHOSEN_ON), pairs.rows(CHOSEN_ON)))
        others = other_tasks(TASK, pair.tokenizer)
        elsewhere = text_of(models, seen)
        one = find(models, chosen_on, elsewhere)
        few = find(models, chosen_on, elsewhere, MOST, by="both")
        sweeps = [sweep_prompts(models, chosen_on, reported, found, STRENGTHS, text, others) for found in (one, few)]
    return sweeps[0], sweeps[1]
