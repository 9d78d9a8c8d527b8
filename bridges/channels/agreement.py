"""Intervention agreement: how well the sparse model's change under an edit predicts the dense model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.channels.prompts import Channels, Prompts, logits_under_edit
from bridges.objective.hybrid import ModelPair, Side
from bridges.tasks.pairs import TaskPairs, probability

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
def intervention_agreement(pair: ModelPair, prompts: Prompts, chosen: Channels) -> Agreement:
    """Edit the same channels in both models at several strengths, and other channels in the sparse one as a control."""
    dense, sparse = (_answer_changes(pair, prompts, chosen, side) for side in ("dense", "sparse"))
    slope, r_squared = least_squares(sparse, dense)
    dz = prompts.dz[pair.bridge_set.index(chosen.site)]
    controls = [
        least_squares(_answer_changes(pair, prompts, chosen._replace(channels=others), "sparse"), dense)[1]
        for others in control_channels(dz, chosen.channels)
    ]
    changed = sparse.abs() > MIN_CHANGE
    sign = (sparse[changed].sign() == dense[changed].sign()).double().mean().item() if changed.any() else None
    return Agreement(slope, r_squared, sign, sum(controls) / len(controls) if controls else None)


def control_channels(dz: Float[Tensor, "b s d_sparse"], channels: Sequence[int]) -> list[tuple[int, ...]]:
    """Draw sets of as many other channels, of those that the prompts change; none if there are too few."""
    changed = dz.flatten(0, 1).any(0)
    changed[list(channels)] = False
    others = changed.nonzero().squeeze(1).cpu()
    if len(others) < len(channels):
        return []
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randperm(len(others), generator=generator)[: len(channels)] for _ in range(N_CONTROLS))
    return [tuple(others[indices].tolist()) for indices in drawn]


def _answer_changes(
    pair: ModelPair, prompts: Prompts, chosen: Channels, side: Side
) -> Float[Tensor, "strengths prompts"]:
    """The change of one model's answer under the counterfactual edit, at every strength."""
    unedited = log_odds(prompts.traces.side(side).logits, prompts.pairs)
    edited = (logits_under_edit(pair, prompts, chosen, strength, side) for strength in AGREEMENT_STRENGTHS)
    return torch.stack([log_odds(logits, prompts.pairs) - unedited for logits in edited]).cpu()


def log_odds(logits: Float[Tensor, "b s vocab"], pairs: TaskPairs) -> Float[Tensor, " b"]:
    """log P(target) - log P(answer) after the last token, float64."""
    last = logits[:, -1].double()
    targets, answers = (probability(last, tokens) for tokens in (pairs.targets, pairs.answers))
    return targets.clamp(min=MIN_PROBABILITY).log() - answers.clamp(min=MIN_PROBABILITY).log()


def least_squares(x: Float[Tensor, "..."], y: Float[Tensor, "..."]) -> tuple[float, float]:
    """Slope and R squared of the regression of y on x; both are 0 if one of them does not vary beyond rounding."""
    from scipy.stats import linregress

    if any((values - values.mean()).abs().max() <= MIN_CHANGE for values in (x, y)):
        return 0.0, 0.0
    line = linregress(x.flatten(), y.flatten())
    return float(line.slope), float(line.rvalue**2)  # pyright: ignore[reportAttributeAccessIssue]
