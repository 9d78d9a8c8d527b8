"""sweep(): P(target) over strengths of an edit, with confidence bands, beside every baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.channels.baselines import dense_directions, mean_difference
from bridges.channels.find import CHOSEN_ON, FoundChannels, find
from bridges.channels.prompts import (
    Channels,
    Prompts,
    addend_of,
    check_channels,
    check_text,
    frozen_pair,
    p_target,
    pairs_of,
    prompts_of,
    text_of,
    tokenizer_of,
)
from bridges.channels.search import BUDGET, TEXT_ROWS, By, check_search, sampled
from bridges.channels.side_effects import Agreement, SideEffects, intervention_agreement, other_tasks, side_effects
from bridges.io.files import write_json
from bridges.models.residual import ResidualModel, Trace, context_limit
from bridges.objective.hybrid import ModelPair
from bridges.report.plots import steering_plot
from bridges.steering.delta import EntryPoint, dense_addend, edited_logits, random_addends
from bridges.tasks.pairs import TaskPairs, solved

STRENGTHS = tuple(i / 10 for i in range(11))
RANDOM_DIRECTIONS = 20
RESAMPLES = 1000


class Curve(NamedTuple):
    """P(target), one entry per strength."""

    mean: list[float]
    low: list[float]
    """Where 95 % of the means of resampled prompts begin."""
    high: list[float]


@dataclass(frozen=True)
class Sweep:
    """An edit's curve and its baselines, on prompts that the channels were not chosen on."""

    task: str
    chosen: Channels
    strengths: list[float]
    curves: dict[str, Curve]
    """By name: `p_target`, the edit itself, and `p_target_...`, the baselines."""
    p_target_by_direction: list[float]
    """At strength 1, where the task's first prompt was presented and where its second was."""
    prompts: int
    accuracy_dense: float
    accuracy_sparse: float
    mean_difference_site: str
    agreement: Agreement
    effects: SideEffects
    ranking_agreement: float | None = None
    """Rank correlation of predicted and done effects where the channels were searched for."""

    def to_dict(self) -> dict[str, Any]:
        """The content of `steering.json`."""
        channels = self.chosen.channels
        content: dict[str, Any] = {
            "task": self.task,
            "site": self.chosen.site,
            "channel": channels[0] if len(channels) == 1 else list(channels),
            "at": self.chosen.at,
            "strengths": self.strengths,
        }
        content |= {name: curve.mean for name, curve in self.curves.items()}
        bands = {name: {"low": curve.low, "high": curve.high} for name, curve in self.curves.items()}
        content |= {
            "bands": bands,
            "p_target_by_direction": self.p_target_by_direction,
            "prompts": self.prompts,
            "accuracy_dense": self.accuracy_dense,
            "accuracy_sparse": self.accuracy_sparse,
            "mean_difference_site": self.mean_difference_site,
            "agreement": self.agreement._asdict(),
            "side_effects": self.effects._asdict(),
            "ranking_agreement": self.ranking_agreement,
        }
        return content

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        write_json(path, self.to_dict())

    def plot(self, path: str | Path) -> Path:
        """Draw the curves with their bands, log scale, as PNG (paper, figure 9)."""
        return steering_plot(self.to_dict(), path)

    def __str__(self) -> str:
        channels = list(self.chosen.channels)
        what = f"channel {channels[0]}" if len(channels) == 1 else f"channels {channels}"
        first, second = self.p_target_by_direction
        lines = [
            f"{self.task}: P(target), strength {self.strengths[0]:g} to {self.strengths[-1]:g}, {self.prompts} "
            f"held-out prompts (solved: dense {self.accuracy_dense:.0%}, sparse {self.accuracy_sparse:.0%})",
            self._line("p_target", f"{what} at {self.chosen.site} ({self.chosen.at})"),
            *(self._line(name, label) for name, label in BASELINES.items()),
            f"  at strength 1, presented either way round: {first:.3f} and {second:.3f}",
            f"  {self.agreement}",
            f"  {self.effects}",
        ]
        return "\n".join(lines)

    def _line(self, name: str, label: str) -> str:
        curve = self.curves[name]
        band = f"[{curve.low[-1]:.3f}, {curve.high[-1]:.3f}]"
        return f"  {label:<62} {curve.mean[0]:.3f} -> {curve.mean[-1]:.3f} {band}"


BASELINES = {
    "p_target_random_direction": "random directions of the same norm",
    "p_target_mean_difference_equal_norm": "the dense model's mean difference there, same norm",
    "p_target_probe": "a linear probe's direction there, same norm",
    "p_target_mean_difference": "the dense model's mean difference, at its best site and norm",
    "p_target_all_channels": "all channels through the bridge",
    "p_target_sparse_model": "the same edit inside the sparse model",
}


def sweep(
    dense: nn.Module | ResidualModel,
    sparse: nn.Module | ResidualModel,
    bridge_set: BridgeSet,
    task: str | TaskPairs,
    channels: Channels | FoundChannels | int | None = None,
    strengths: Sequence[float] = STRENGTHS,
    *,
    by: By = "dense",
    budget: float = BUDGET,
    n: int = 200,
    tokenizer: Any = None,
    seed: int = 0,
    text: Int[Tensor, "rows seq"] | None = None,
    check_models: bool = True,
) -> Sweep:
    """Turn channels by their counterfactual edit and measure the dense model's answer, with every baseline beside it.

    `channels`: those to turn (what `find_channels` returned, too), or how many to search for at most (None: one), by
    the dense model's answer or by both models', within a budget of KL on other text. They and the dense model's own
    directions are chosen on 64 pairs of the task, the curves are measured on `n` others. Side effects are measured on
    `text`, token rows that have nothing to do with the task (None: sampled from the dense model; a search takes some of
    those given for itself), and with a tokenizer on the other tasks. P(target) is the full-vocabulary probability of
    what answers the counterfactual prompt. ValueError for an unknown task, site or channel.
    """
    sampling = text is None
    if not isinstance(channels, Channels | FoundChannels | Integral | None):
        raise ValueError(f"channels={channels!r} must be bridges.Channels, what find_channels returned, or how many")
    most = int(channels) if isinstance(channels, Integral) else 1
    check_search(most, by, budget, name="channels")
    strengths = check_strengths(strengths)
    if n < 2:
        raise ValueError(f"n={n} must be at least 2 prompts, one of either way round")
    tokenizer = tokenizer_of(dense, tokenizer)
    pairs = pairs_of(task, dense, tokenizer, n + CHOSEN_ON, seed)
    if len(pairs.input_ids) < CHOSEN_ON + 2:
        raise ValueError(f"task has {len(pairs.input_ids)} pairs; give {CHOSEN_ON} to choose channels on and 2 or more")
    halves = pairs.rows(0, CHOSEN_ON), pairs.rows(CHOSEN_ON)
    if any(len(half.direction.unique()) < 2 for half in halves):
        raise ValueError(f"task holds pairs of one way round among its first {CHOSEN_ON} or after them; mix them")
    with frozen_pair(dense, sparse, bridge_set, check_models) as pair:
        chosen_on, reported = (prompts_of(pair, half) for half in halves)
        others = [] if tokenizer is None else other_tasks(pairs.task, tokenizer, context_limit(pair.dense, pair.sparse))
        text = sampled(pair, seed, search=False) if text is None else check_text(pair, text)
        if not isinstance(channels, Channels | FoundChannels):
            # What a search measures costs on is not reported on: it takes rows that were given, or samples its own.
            rows = 0 if sampling else min(TEXT_ROWS, len(text) // 2)
            elsewhere, text = (text[:rows], text[rows:]) if rows else (sampled(pair, seed), text)
            channels = find(pair, chosen_on, text_of(pair, elsewhere), most, by, budget)
        return sweep_prompts(pair, chosen_on, reported, channels, strengths, text, others)


def check_strengths(strengths: Any) -> list[float]:
    """The strengths as plain numbers; ValueError unless they are finite, at least one."""
    listed = strengths.tolist() if isinstance(strengths, Tensor | np.ndarray) else strengths
    finite = isinstance(listed, Sequence) and all(isinstance(s, Real) and math.isfinite(s) for s in listed)
    if not finite or not listed:
        raise ValueError(f"strengths={strengths!r} must be a list of finite numbers, at least one")
    return [float(strength) for strength in listed]


@torch.no_grad()
def sweep_prompts(
    pair: ModelPair,
    chosen_on: Prompts,
    reported: Prompts,
    channels: Channels | FoundChannels,
    strengths: Sequence[float],
    text: Tensor,
    others: Sequence[TaskPairs] = (),
) -> Sweep:
    """`sweep` on prompts that were run, of channels that are given or were found."""
    chosen, ranking = (channels.best, channels.agreement) if isinstance(channels, FoundChannels) else (channels, None)
    check_channels(pair, chosen)
    site, values = mean_difference(pair.dense, chosen_on)
    curves = _curves(pair, chosen_on, reported, chosen, strengths) | {
        "p_target_mean_difference": _curve(
            pair.dense, reported.traces.dense, reported.pairs, site, values(reported.pairs), strengths
        )
    }
    at_one = _edit_curve(pair, reported, chosen.site, addend_of(pair, reported, chosen), chosen.at, [1.0])[0]
    dense_solves, sparse_solves = (
        solved(trace.logits[:, -1], reported.pairs).float().mean().item()
        for trace in (reported.traces.dense, reported.traces.sparse)
    )
    return Sweep(
        task=reported.pairs.task,
        chosen=chosen,
        strengths=list(strengths),
        curves={name: _banded(curves[name]) for name in ("p_target", *BASELINES)},
        p_target_by_direction=[at_one[reported.pairs.direction == side].mean().item() for side in (0, 1)],
        prompts=len(at_one),
        accuracy_dense=dense_solves,
        accuracy_sparse=sparse_solves,
        mean_difference_site=pair.dense.sites[site],
        agreement=intervention_agreement(pair, reported, chosen),
        effects=side_effects(pair, reported, chosen, text, others),
        ranking_agreement=ranking,
    )


def _curves(
    pair: ModelPair, chosen_on: Prompts, reported: Prompts, chosen: Channels, strengths: Sequence[float]
) -> dict[str, Float[Tensor, "strengths prompts"]]:
    """The edit's curve and those of everything that is added where it is added."""
    i, at = pair.bridge_set.index(chosen.site), chosen.at
    addend = addend_of(pair, reported, chosen)
    everything = dense_addend(pair, i, reported.dz[i], at)
    directions = dense_directions(pair, chosen_on, chosen)
    curves = {
        "p_target": _edit_curve(pair, reported, chosen.site, addend, at, strengths),
        "p_target_random_direction": _random_curve(pair, reported, chosen, addend, strengths),
        "p_target_all_channels": _edit_curve(pair, reported, chosen.site, everything, at, strengths),
    }
    for name, direction in zip(("mean_difference_equal_norm", "probe"), directions, strict=True):
        along = direction[reported.pairs.direction][:, None] * addend.norm(dim=-1, keepdim=True)
        curves[f"p_target_{name}"] = _edit_curve(pair, reported, chosen.site, along, at, strengths)
    inside = addend_of(pair, reported, chosen, "sparse")
    curves["p_target_sparse_model"] = _curve(
        pair.sparse, reported.traces.sparse, reported.pairs, pair.site("sparse", i), inside, strengths, at
    )
    return curves


def _edit_curve(
    pair: ModelPair, prompts: Prompts, site: str, addend: Tensor, at: EntryPoint, strengths: Sequence[float]
) -> Float[Tensor, "strengths prompts"]:
    where = pair.site("dense", pair.bridge_set.index(site))
    return _curve(pair.dense, prompts.traces.dense, prompts.pairs, where, addend, strengths, at)


def _curve(
    model: ResidualModel,
    trace: Trace,
    pairs: TaskPairs,
    site: int,
    addend: Tensor,
    strengths: Sequence[float],
    at: EntryPoint = "residual",
) -> Float[Tensor, "strengths prompts"]:
    """P(target) of every prompt at every strength of an addend."""
    logits = (edited_logits(model, trace, site, strength * addend, at) for strength in strengths)
    return torch.stack([p_target(one, pairs) for one in logits])


def _random_curve(
    pair: ModelPair, prompts: Prompts, chosen: Channels, addend: Tensor, strengths: Sequence[float]
) -> Float[Tensor, "strengths prompts"]:
    """Mean over random directions, each with the addend's own norm at every token."""
    values = random_addends(addend, RANDOM_DIRECTIONS, seed=1)
    return torch.stack([_edit_curve(pair, prompts, chosen.site, v, chosen.at, strengths) for v in values]).mean(0)


def _banded(values: Float[Tensor, "strengths prompts"]) -> Curve:
    """The mean over prompts, and the middle 95 % of the means over prompts drawn with replacement."""
    rows = values.double().cpu().numpy()
    drawn = np.random.default_rng(0).integers(rows.shape[1], size=(RESAMPLES, rows.shape[1]))
    low, high = np.quantile(rows[:, drawn].mean(-1), (0.025, 0.975), axis=1)
    return Curve(rows.mean(1).tolist(), low.tolist(), high.tolist())
