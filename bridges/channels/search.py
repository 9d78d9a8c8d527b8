"""Which sets of channels turn an answer, grown one channel at a time within what they may cost elsewhere."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.channels.prompts import Channels, Prompts, Text, addend_of, edited, entries, inside, logits_off, p_target
from bridges.config import DEFAULT_SEQ_LEN
from bridges.data.sampled import sampled_text
from bridges.models.residual import ResidualModel
from bridges.objective.hybrid import SIDES, ModelPair, Side
from bridges.ops.kl import kl_divergence
from bridges.steering.delta import EntryPoint, edited_logits, random_addends, stream_to_read_transpose
from bridges.tasks.pairs import TaskPairs

By = Literal["dense", "both"]
"""Whose answer channels are chosen by: the dense model's, or both models'."""
Effects = dict[tuple[int, EntryPoint], Tensor]
"""Per bridged site and entry a figure for every sparse channel."""
CANDIDATES = 16
"""Channels per site and entry whose edit is done after the prediction."""
MOST = 8
"""Channels that a set may grow to."""
PLACES = 3
"""Sites and entries at which sets are grown, of those that promise most."""
CONTROLS = 5
"""Random directions that a set is held against while it is chosen."""
BUDGET = 0.04
"""KL that turning a set off may cost the dense model on other text, nats per token."""
TEXT_ROWS = 16
"""Rows of the text that is sampled to measure this cost on, where none is given."""


class Grown(NamedTuple):
    """A set of channels, and the mean P(target) under its counterfactual edit at strength 1."""

    channels: Channels
    p_target: float
    p_target_sparse: float
    """Of the sparse model, edited at the same channels."""
    p_target_random: float
    """Of the dense model under the strongest of a few random directions of the edit's own norm."""
    kl_off: float
    """KL of the dense model on other text with the channels turned off, nats per token."""

    def margin(self, by: By) -> float:
        """What the edit does beyond random directions; by both: the geometric mean with the sparse model's."""
        beyond = self.p_target - self.p_target_random
        return beyond if by == "dense" else (max(beyond, 0.0) * self.p_target_sparse) ** 0.5


def check_search(most: int, by: str, budget: float = BUDGET, candidates: int = CANDIDATES, name: str = "most") -> None:
    """ValueError unless a set may grow so large (`name` is what the caller calls that), by what is named."""
    if not isinstance(most, Integral) or not 1 <= most <= MOST:
        raise ValueError(f"{name}={most!r} must be a whole number between 1 and {MOST}")
    if not isinstance(candidates, Integral) or candidates < 8:
        raise ValueError(f"candidates={candidates!r} must be a whole number, at least 8")
    if not isinstance(budget, int | float) or not budget >= 0:
        raise ValueError(f"budget={budget!r} must be 0 nats or more; infinity takes any channel")
    if by not in get_args(By):
        raise ValueError(f"by={by!r} must be one of {', '.join(get_args(By))}")


def sampled(pair: ModelPair, seed: int, search: bool = True) -> Int[Tensor, "rows seq"]:
    """Text sampled from the dense model: what a `search` measures costs on, or, never the same, what is reported on."""
    width = min(DEFAULT_SEQ_LEN, pair.dense.context_length or DEFAULT_SEQ_LEN)
    return sampled_text(pair.dense, TEXT_ROWS, width, 2 * seed + search)


def predicted_effects(
    pair: ModelPair, prompts: Prompts, side: Side = "dense"
) -> dict[tuple[int, EntryPoint], Float[Tensor, " d_sparse"]]:
    """First-order effect of every channel's edit on one model's mean log P(target), from one backward pass.

    Per channel the sum over tokens of its change where the edit enters, times the gradient there; for the dense model
    the change is dz times the decoder's column.
    """
    gradients = _gradients(pair.model(side), prompts.pairs)
    effects: dict[tuple[int, EntryPoint], Tensor] = {}
    for i, bridge in enumerate(pair.bridge_set):
        site = pair.site(side, i)
        for at in entries(pair, i):
            gradient = gradients[at][site]
            if side == "sparse":
                effects[i, at] = torch.einsum("bsc,bsc->c", gradient, inside(prompts, i, at).to(gradient))
                continue
            if at == "read":
                gradient = stream_to_read_transpose(pair.dense.norm(site), bridge.rms_dense, gradient)
            weight = bridge.decoder_weight.detach().to(prompts.dz[i])
            effects[i, at] = torch.einsum("bsd,dc,bsc->c", gradient.to(prompts.dz[i]), weight, prompts.dz[i])
    return effects


def _gradients(model: ResidualModel, pairs: TaskPairs) -> dict[EntryPoint, list[Tensor]]:
    """The gradient of the mean log P(target) at every site's stream and at its read."""
    nudges: list[Tensor] = []

    def nudged(read: Tensor) -> Tensor:
        nudges.append(torch.zeros_like(read, requires_grad=True))
        return read + nudges[-1]

    with torch.enable_grad(), model.hook_reads({i: nudged for i in range(len(model.sites))}):
        trace = model.trace(pairs.input_ids.to(model.device), pairs.attention_mask.to(model.device), True)
        found = torch.autograd.grad(log_p(p_target(trace.logits, pairs)), [*trace.residuals, *nudges])
    return {"residual": list(found[: len(nudges)]), "read": list(found[len(nudges) :])}


class Search:
    """Grows sets of channels by one model's answer or by both models'."""

    def __init__(self, pair: ModelPair, prompts: Prompts, text: Text, by: By, candidates: int, predicted: Effects):
        self.pair, self.prompts, self.text, self.by, self.candidates = pair, prompts, text, by, candidates
        self.predicted = self.potential = predicted
        self.known: dict[tuple[Channels, Side], float] = {}
        self.costs: dict[Channels, float] = {}
        if by == "both":
            self.in_sparse = predicted_effects(pair, prompts, "sparse")
            self.potential = {
                place: (effects.clamp(min=0) * self.in_sparse[place].clamp(min=0)).sqrt()
                for place, effects in predicted.items()
            }

    def score(self, chosen: Channels) -> float:
        """P(target) of the dense model, or the geometric mean with the sparse model's."""
        p = self.p_target(chosen, "dense")
        return p if self.by == "dense" else (p * self.p_target(chosen, "sparse")) ** 0.5

    def p_target(self, chosen: Channels, side: Side) -> float:
        """The mean P(target) of one model under the edit, which is done once."""
        if (chosen, side) not in self.known:
            self.known[chosen, side] = edited(self.pair, self.prompts, chosen, side=side).mean().item()
        return self.known[chosen, side]

    def kl_off(self, chosen: Channels) -> float:
        """What turning the channels off costs on other text, measured once."""
        if chosen not in self.costs:
            plain, off = self.text.trace.logits, logits_off(self.pair, self.text, chosen)
            kl = kl_divergence(plain.flatten(0, 1), off.flatten(0, 1)).item()
            self.costs[chosen] = kl / plain[..., 0].numel()
        return self.costs[chosen]

    def affordable(self, chosen: Channels, budget: float) -> bool:
        """Whether turning the channels off keeps within a budget, measured only where there is one."""
        return budget == math.inf or self.kl_off(chosen) <= budget

    def grown(self, most: int, budget: float) -> list[list[Grown]]:
        """The sets at the places that promise most: within the budget those that help, else any that help, else any.

        A warning tells where the budget was lifted.
        """
        unedited, task = self.unedited(), self.prompts.pairs.task
        for limit, least in ((budget, unedited), (math.inf, unedited), (math.inf, -1.0)):
            grown = [self.grow(place, most, limit, least) for place in self.places(most, limit)]
            if any(grown):
                if limit > budget:
                    what = f"budget={budget}: no channel raises P(target) of {task!r} within it; it was lifted"
                    warnings.warn(what, stacklevel=2)
                return [sets for sets in grown if sets]
        raise FloatingPointError(f"no edit's P(target) of {task!r} is a number; look for models or bridges with NaN")

    def unedited(self) -> float:
        """The score of no channels."""
        p = {s: p_target(self.prompts.traces.side(s).logits, self.prompts.pairs).mean().item() for s in SIDES}
        return p["dense"] if self.by == "dense" else (p["dense"] * p["sparse"]) ** 0.5

    def places(self, most: int, budget: float) -> list[tuple[int, EntryPoint]]:
        """Where sets are grown: everywhere where they hold one channel, else where the likeliest channels do most."""
        if most == 1:
            return list(self.potential)

        def promise(place: tuple[int, EntryPoint]) -> float:
            likely: tuple[int, ...] = ()
            for channel in largest(self.potential[place], 2 * most):
                if len(likely) < most and self.affordable(self.channels(place, (*likely, channel)), budget):
                    likely = (*likely, channel)
            return self.score(self.channels(place, likely)) if likely else 0.0

        return sorted(self.potential, key=promise, reverse=True)[:PLACES]

    def channels(self, place: tuple[int, EntryPoint], channels: Sequence[int]) -> Channels:
        """Some channels at a place."""
        return Channels(self.pair.bridge_set.sites[place[0]], tuple(channels), place[1])

    def tried(self, place: tuple[int, EntryPoint]) -> list[int]:
        """The channels of largest predicted effect; by both, on both models, and a few on either."""
        if self.by == "dense":
            return largest(self.potential[place], self.candidates)
        many, few = self.candidates // 2, self.candidates // 8
        each = ((self.potential, many), (self.predicted, few), (self.in_sparse, few))
        return list(dict.fromkeys(channel for effects, n in each for channel in largest(effects[place], n)))

    def grow(self, place: tuple[int, EntryPoint], most: int, budget: float, least: float) -> list[Grown]:
        """Sets of one channel, two, ..., each the best within the budget, while one more makes the score larger.

        The first one's must be over `least`.
        """
        sets: list[Grown] = []
        tried, channels, best = self.tried(place), (), least
        while len(channels) < most:
            larger = [self.channels(place, (*channels, c)) for c in tried if c not in channels]
            scored = {one: score for one in larger if (score := self.score(one)) > best}
            by_score = sorted(scored, key=scored.__getitem__, reverse=True)
            chosen = next((one for one in by_score if self.affordable(one, budget)), None)
            if chosen is None:
                break
            channels, best = chosen.channels, scored[chosen]
            sets.append(self.held_against_random(chosen))
        return sets

    def held_against_random(self, chosen: Channels) -> Grown:
        """The set with what it does, beside what random directions of its norm do."""
        pair, prompts = self.pair, self.prompts
        site = pair.site("dense", pair.bridge_set.index(chosen.site))
        addends = random_addends(addend_of(pair, prompts, chosen), CONTROLS, seed=0)  # others than those reported
        logits = (edited_logits(pair.dense, prompts.traces.dense, site, addend, chosen.at) for addend in addends)
        controls = [p_target(one, prompts.pairs).mean().item() for one in logits]
        return Grown(
            chosen, self.p_target(chosen, "dense"), self.p_target(chosen, "sparse"), max(controls), self.kl_off(chosen)
        )


def log_p(p: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """The mean logarithm; one probability that is 0 to the last bit must not make every prediction NaN."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).log().mean()


def largest(effects: Float[Tensor, " d_sparse"], n: int) -> list[int]:
    """The channels of largest predicted effect."""
    return effects.topk(min(n, len(effects))).indices.tolist()
