"""Intervention agreement: how well the sparse model's change under an edit predicts the dense model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridges.channels.prompts import Channels
from bridges.channels.runs import Prompts, logits_under_edit, unedited_last_logits
from bridges.io.progress import Bar
from bridges.objective.pair import ModelPair, Side
from bridges.tasks.pairs import TaskPairs, probabilities

AGREEMENT_STRENGTHS = (0.25, 0.5, 0.75, 1.0)
N_CONTROLS = 4
"""Sets of other channels that the sparse model is edited at for comparison."""
MIN_CHANGE = 1e-6
"""Changes of an answer up to this, nats, are rounding."""
MIN_PROBABILITY = 1e-30
"""In place of probabilities that are 0 in a model that is sure of another token."""


class Agreement(NamedTuple):
    """The dense model's change of answer regressed on the sparse model's, over prompts and strengths.

    An answer is log P(target) - log P(answer), nats.
    """

    slope: float
    """Dense change per sparse change, least squares."""
    r_squared: float
    sign: float | None
    """Part of prompts and strengths at which both answers change with the same sign, of those at which the sparse
    model's changes; None if it never does."""
    r_squared_shuffled: float | None
    """The control: the sparse model edited at as many other channels, of those that the prompts change at the site;
    None if there are fewer."""

    def __str__(self) -> str:
        control = "none" if self.r_squared_shuffled is None else f"{self.r_squared_shuffled:.2f}"
        return (
            f"intervention agreement: slope {self.slope:.2f}, R squared {self.r_squared:.2f} "
            f"(shuffled channels {control}), same sign {'none' if self.sign is None else f'{self.sign:.0%}'}"
        )


@torch.no_grad()
def intervention_agreement(pair: ModelPair, prompts: Prompts, chosen: Channels, bar: Bar | None = None) -> Agreement:
    """Edit the same channels in both models at several strengths, and other channels in the sparse one as a control."""
    others = control_channels(changed_channels(pair, prompts, chosen), chosen.channels)
    controls = [chosen._replace(channels=channels) for channels in others]
    (dense,) = _answer_changes(pair, prompts, [chosen], "dense", bar)
    sparse, *of_controls = _answer_changes(pair, prompts, [chosen, *controls], "sparse", bar)
    slope, r_squared = least_squares(sparse, dense)
    r_squared_controls = [least_squares(one, dense)[1] for one in of_controls]
    changed = sparse.abs() > MIN_CHANGE
    sign = (sparse[changed].sign() == dense[changed].sign()).double().mean().item() if changed.any() else None
    shuffled = sum(r_squared_controls) / len(r_squared_controls) if r_squared_controls else None
    return Agreement(slope, r_squared, sign, shuffled)


def changed_channels(pair: ModelPair, prompts: Prompts, chosen: Channels) -> Bool[Tensor, " d_sparse"]:
    """True at the channels that the prompts change at the site."""
    i = pair.bridge_set.index(chosen.site)
    of_batches = [run.dz[i].flatten(0, 1).any(0).cpu() for run in prompts.runs([i])]
    return torch.stack(of_batches).any(0)


def control_channels(changed: Bool[Tensor, " d_sparse"], channels: Sequence[int]) -> list[tuple[int, ...]]:
    """Draw sets of as many other channels, of those that the prompts change; none if there are too few."""
    changed = changed.clone()
    changed[list(channels)] = False
    others = changed.nonzero().squeeze(1)
    if len(others) < len(channels):
        return []
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randperm(len(others), generator=generator)[: len(channels)] for _ in range(N_CONTROLS))
    return [tuple(others[indices].tolist()) for indices in drawn]


def _answer_changes(
    pair: ModelPair, prompts: Prompts, edits: Sequence[Channels], side: Side, bar: Bar | None
) -> list[Float[Tensor, "strengths prompts"]]:
    """The change of one model's answer under each counterfactual edit, at every strength."""
    parts = []
    for run in prompts.runs([pair.bridge_set.index(edits[0].site)]):
        unedited = log_odds(unedited_last_logits(pair.model(side), run.side(side)), run.pairs)
        of_batch = []
        for chosen in edits:
            edited = (logits_under_edit(pair, run, chosen, strength, side) for strength in AGREEMENT_STRENGTHS)
            of_batch.append(torch.stack([log_odds(logits, run.pairs) - unedited for logits in edited]).cpu())
            if bar is not None:
                bar.advance(len(run.rows))
        parts.append((run.rows, torch.stack(of_batch)))
    return list(prompts.gather(parts))


def log_odds(last: Float[Tensor, "b vocab"], pairs: TaskPairs) -> Float[Tensor, " b"]:
    """log P(target) - log P(answer) from the logits after the last token, float64."""
    targets, answers = probabilities(last.double(), pairs.target_sets, pairs.answer_sets)
    return targets.clamp(min=MIN_PROBABILITY).log() - answers.clamp(min=MIN_PROBABILITY).log()


def least_squares(x: Float[Tensor, "..."], y: Float[Tensor, "..."]) -> tuple[float, float]:
    """Slope and R squared of the regression of y on x; both are 0 if one of them does not vary beyond rounding."""
    from scipy.stats import linregress

    if any((values - values.mean()).abs().max() <= MIN_CHANGE for values in (x, y)):
        return 0.0, 0.0
    line = linregress(x.flatten(), y.flatten())
    return float(line.slope), float(line.rvalue**2)  # pyright: ignore[reportAttributeAccessIssue]
