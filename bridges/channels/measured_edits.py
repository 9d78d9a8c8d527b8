"""What edits and ablations of channels do on one task, each run once and remembered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from bridges.channels.attribution import Location
from bridges.channels.prompts import Channels
from bridges.channels.reference_text import ReferenceText
from bridges.channels.runs import Prompts, p_target_under_edits, p_target_under_random, p_target_unedited
from bridges.io.progress import progress_bar
from bridges.objective.pair import ModelPair, Side

SEARCH_DIRECTIONS = 5
"""Random directions that a set is compared with while it is chosen."""


class MeasuredEdits:
    """Counterfactual edits on the prompts of a task, and ablations on other text; each is made once.

    `sides`: the models that edits are judged by, the dense one first.
    """

    def __init__(
        self, pair: ModelPair, prompts: Prompts, text: ReferenceText, sides: Sequence[Side], progress: bool = False
    ):
        self.pair, self.prompts, self.text, self.progress = pair, prompts, text, progress
        self.sides: tuple[Side, ...] = tuple(sides)
        self._p_target: dict[tuple[Channels, Side], Float[Tensor, " n"]] = {}
        self._ablation_kl: dict[Channels, float] = {}
        self._p_random: dict[Channels, float] = {}

    def channels_at(self, location: Location, channels: Sequence[int]) -> Channels:
        """Channels at a location, by the names that users see."""
        return Channels(self.pair.bridge_set.sites[location.bridge], tuple(channels), location.at)

    def run_edits(self, edits: Sequence[Channels], what: str | None = None, side: Side | None = None) -> None:
        """Make the edits that have not been made, in the models that edits are judged by, or in one."""
        for one in self.sides if side is None else (side,):
            new = [chosen for chosen in dict.fromkeys(edits) if (chosen, one) not in self._p_target]
            if new:
                n_steps = len(new) * len(self.prompts)
                with progress_bar(what or f"{len(new)} edits", n_steps, self.progress) as bar:
                    p = p_target_under_edits(self.pair, self.prompts, new, one, bar=bar)
                self._p_target |= {(chosen, one): row for chosen, row in zip(new, p, strict=True)}

    def p_target_per_prompt(self, chosen: Channels, side: Side = "dense") -> Float[Tensor, " n"]:
        """P(target) of one model under the counterfactual edit."""
        self.run_edits([chosen], side=side)
        return self._p_target[chosen, side]

    def score(self, chosen: Channels) -> float:
        """Mean P(target) of the dense model, or its geometric mean with the sparse model's."""
        return _geometric_mean([self.p_target_per_prompt(chosen, side) for side in self.sides])

    @cached_property
    def unedited_score(self) -> float:
        """The score without an edit."""
        return _geometric_mean([p_target_unedited(self.pair, self.prompts, side) for side in self.sides])

    def ablation_kl(self, chosen: Channels) -> float:
        """KL of the dense model on the text with the channels ablated, nats per token."""
        if chosen not in self._ablation_kl:
            self._ablation_kl[chosen] = self.text.ablation_kl(chosen)
        return self._ablation_kl[chosen]

    def helpful(self, edits: Sequence[Channels], than: float | None = None) -> list[Channels]:
        """The edits whose score is over another one, by default over that without an edit."""
        self.run_edits(edits)
        return [one for one in edits if self.score(one) > (self.unedited_score if than is None else than)]

    def p_target_random(self, chosen: Channels) -> float:
        """P(target) of the dense model under the strongest of a few random directions with the edit's own norm."""
        if chosen not in self._p_random:
            # Another seed than that of the directions that a sweep reports.
            random = p_target_under_random(self.pair, self.prompts, chosen, SEARCH_DIRECTIONS, seed=0)
            self._p_random[chosen] = random.mean(1).max().item()
        return self._p_random[chosen]

    def margin(self, chosen: Channels) -> float:
        """`margin_over_random` of an edit, with the runs of the models that edits are judged by."""
        p_target, *sparse = (self.p_target_per_prompt(chosen, side).mean().item() for side in self.sides)
        return margin_over_random(p_target, self.p_target_random(chosen), *sparse)


def margin_over_random(p_target: float, p_target_random: float, p_target_sparse: float | None = None) -> float:
    """P(target) of the dense model beyond that of random directions, or its geometric mean with the sparse model's.

    >>> margin_over_random(0.75, 0.25), margin_over_random(0.75, 0.25, 0.5), margin_over_random(0.1, 0.2, 0.5)
    (0.5, 0.5, 0.0)
    """
    beyond = p_target - p_target_random
    return beyond if p_target_sparse is None else (max(beyond, 0.0) * p_target_sparse) ** 0.5


def _geometric_mean(p_per_model: Sequence[Float[Tensor, " b"]]) -> float:
    """Of each model's mean over prompts."""
    return math.prod(p.mean().item() for p in p_per_model) ** (1 / len(p_per_model))
