"""bridges demo: fit fresh bridges for the bundled pair, measure them, and steer the dense model by one channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bridges.bridge import BridgeSet
from bridges.circuits.tasks import single_double_quote
from bridges.config import FitConfig
from bridges.data.corpus import bundled_documents, encode_documents, pack_rows
from bridges.files import write_json
from bridges.fit import fit
from bridges.models.huggingface import as_residual
from bridges.models.loading import frozen
from bridges.models.pair import Pair, load_pair
from bridges.report.page import write_page
from bridges.report.plots import quality_plot, steering_plot
from bridges.sweep import find_channels, prompts_of, sweep
from bridges.training.hybrid import ModelPair

SETTINGS = FitConfig(
    steps=600, batch_size=8, seq_len=128, lr=2e-3, closed_form_tokens=200_000, sites_per_step=1, eval_tokens=16_384
)
STRENGTHS = tuple(i / 10 for i in range(11))
CHOSEN_ON, REPORTED, FEW = 64, 200, 4
TRAIN_DOCUMENTS, HELDOUT_DOCUMENTS = 3000, 300


def demo(out: str | Path = "runs/demo", config: FitConfig = SETTINGS, prompts: int = REPORTED) -> dict[str, Any]:
    """Write everything that `bridges demo` shows under `out`; returns the content of `steering.json`."""
    out, console = Path(out), Console()
    pair = load_pair()
    console.print("Fitting bridges for the bundled pair: closed form, then a short polish.", style="bold")
    train, heldout = (
        demo_rows(pair, split, n, config.seq_len or 128, config.seed)
        for split, n in (("train", TRAIN_DOCUMENTS), ("heldout", HELDOUT_DOCUMENTS))
    )
    bridge_set = fit(pair.dense, pair.sparse, train, eval_data=heldout, config=config)
    bridge_set.save_pretrained(out / "bridges")
    assert bridge_set.report is not None, "fit always reports"
    bridge_set.report.save(out / "report.json")
    quality_plot(bridge_set.report, out / "quality.png")
    console.print("\nHeld-out figures, controls in brackets", style="bold")
    console.print(str(bridge_set.report), highlight=False, soft_wrap=True)
    steering = steer_quotes(pair, bridge_set, prompts)
    write_json(out / "steering.json", steering)
    steering_plot(steering, out / "steering.png")
    write_page(bridge_set.report, steering, out)
    console.print(f"\n{summary(steering)}", highlight=False, soft_wrap=True)
    console.print(f"\nWritten to {out}: index.html shows it all.")
    return steering


def demo_rows(pair: Pair, split: str, n_documents: int, seq_len: int, seed: int) -> Tensor:
    """Rows [n, seq_len] of the first documents of a split of the bundled text."""
    documents = bundled_documents(split, seed)[:n_documents]  # pyright: ignore[reportArgumentType]
    return pack_rows(encode_documents(pair.tokenizer, documents), seq_len, pair.tokenizer.bos_token_id)


def steer_quotes(pair: Pair, bridge_set: BridgeSet, prompts: int) -> dict[str, Any]:
    """The counterfactual edit of one sparse channel on `single_double_quote`, over strengths, with its baselines.

    Channels are chosen on other prompts than those reported. What the best few channels at one site do stands beside.
    """
    with frozen(pair.dense), frozen(pair.sparse), torch.no_grad():
        models = ModelPair(as_residual(pair.dense), as_residual(pair.sparse), bridge_set)
        chosen_on = prompts_of(models, single_double_quote(pair.tokenizer, CHOSEN_ON, seed=1))
        reported = prompts_of(models, single_double_quote(pair.tokenizer, prompts, seed=2))
        steering = sweep(models, chosen_on, reported, find_channels(models, chosen_on), STRENGTHS)
        few = sweep(models, chosen_on, reported, find_channels(models, chosen_on, most=FEW), STRENGTHS)
    keys = ("site", "at", "channel", "p_target", "p_target_random_direction", "p_target_by_target_token")
    for curves in (steering, few):
        by_token = curves["p_target_by_target_token"]
        curves["p_target_by_target_token"] = {pair.tokenizer.decode(int(token)): p for token, p in by_token.items()}
    return steering | {"few_channels": {key: few[key] for key in keys}}


def summary(steering: dict[str, Any]) -> str:
    """The steering result in a few lines."""
    few = steering["few_channels"]
    channels = few["channel"] if isinstance(few["channel"], list) else [few["channel"]]
    lines = [
        f"Steering {steering['task']}: the other quote's P, strength 0 to 1, {steering['prompts']} held-out prompts",
        _line(f"channel {steering['channel']} at {steering['site']} ({steering['at']})", steering["p_target"]),
        _line(f"channels {channels} at {few['site']} ({few['at']})", few["p_target"]),
        _line("random directions of the same norm", steering["p_target_random_direction"]),
        _line("all channels through the bridge", steering["p_target_all_channels"]),
        _line("the dense model's mean difference", steering["p_target_mean_difference"]),
        _line("the same edit inside the sparse model", steering["p_target_sparse_model"]),
    ]
    by_target = ", ".join(f"{p:.3f} toward {token}" for token, p in steering["p_target_by_target_token"].items())
    return "\n".join([*lines, f"  one channel, either way round, at strength 1: {by_target}"])


def _line(name: str, curve: list[float]) -> str:
    return f"  {name:<52} {curve[0]:.3f} -> {curve[-1]:.3f}"
