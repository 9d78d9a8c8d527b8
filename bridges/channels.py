"""find_channels(): which channel of the sparse model turns the dense model's answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.circuits.tasks import TaskPairs
from bridges.intervention import At, as_read_adjoint, edited_logits, random_addends
from bridges.models.residual import ResidualModel
from bridges.prompts import Channels, Prompts, addend_of, edited, inside, model_pair, p_target, pairs_of, prompts_of
from bridges.training.hybrid import ModelPair, Side

By = Literal["dense", "both"]
"""Whose answer channels are chosen by: the dense model's, or both models'."""
Effects = dict[tuple[int, At], Tensor]
"""Per bridged site and entry a figure for every sparse channel."""
ENTRIES: tuple[At, ...] = ("read", "residual")
CHOSEN_ON = 64
"""Prompts that channels are chosen on, other ones than those reported."""
CANDIDATES = 16
"""Channels per site and entry whose edit is done after the prediction."""
MOST = 8
"""Channels that a set may grow to."""
PLACES = 3
"""Sites and entries at which sets are grown, of those that promise most."""
CONTROLS = 5
"""Random directions that a set is held against while it is chosen."""
SLACK = 0.05
"""How much less than the largest margin a set may have and still be kept for being smaller: a smaller edit moves less
else."""


class RankedChannel(NamedTuple):
    """One channel's counterfactual edit at strength 1: what was predicted of it, and what it did."""

    site: str
    channel: int
    at: At
    predicted: float
    """First-order change of the dense model's mean log P(target), nats."""
    effect: float
    """The change that the edit made, nats."""
    p_target: float
    """The dense model's mean P(target) under the edit."""


class Grown(NamedTuple):
    """A set of channels, and the mean P(target) under its counterfactual edit at strength 1."""

    channels: Channels
    p_target: float
    p_target_sparse: float
    """Of the sparse model, edited at the same channels."""
    p_target_random: float
    """Of the dense model under the strongest of a few random directions of the edit's own norm."""

    def margin(self, by: By) -> float:
        """What the edit does beyond random directions; by both: the geometric mean with the sparse model's."""
        beyond = self.p_target - self.p_target_random
        return beyond if by == "dense" else (max(beyond, 0.0) * self.p_target_sparse) ** 0.5


class FoundChannels(NamedTuple):
    """What `find_channels` found on its prompts."""

    task: str
    ranking: list[RankedChannel]
    """Every single channel whose edit was done, largest P(target) first."""
    agreement: float
    """Spearman's rank correlation of prediction and effect over the ranking."""
    sets: list[Grown]
    """Sets of 1, 2, ... channels at one site, each grown from the one before; the last is the one to use."""

    @property
    def best(self) -> Channels:
        """The last set: the smallest of those whose margin comes near the largest."""
        return self.sets[-1].channels


def find_channels(
    dense: nn.Module | ResidualModel,
    sparse: nn.Module | ResidualModel,
    bridge_set: BridgeSet,
    task: str | TaskPairs,
    n: int = CHOSEN_ON,
    *,
    most: int = 1,
    by: By = "dense",
    candidates: int = CANDIDATES,
    tokenizer: Any = None,
    seed: int = 0,
    check_models: bool = True,
) -> FoundChannels:
    """Rank channels by what their counterfactual edit does to the dense model's answer on `n` pairs of a task.

    One backward pass predicts the effect of every channel at every site, at the read and at the residual: dz times the
    decoder's column times the gradient where the edit enters. The `candidates` of largest prediction are then edited.
    Sets grow greedily, to at most `most` channels at one site: by the dense model's P(target), or (`by="both"`) by the
    geometric mean of both models', which finds channels that the sparse model itself decides by. At the site where a
    set does most beyond the strongest of a few random directions of its norm, the smallest set that does nearly as much
    is kept. Report on other prompts than these.
    """
    check_search(most, by, candidates)
    with model_pair(dense, sparse, bridge_set, check_models) as pair:
        return find(pair, prompts_of(pair, pairs_of(task, dense, tokenizer, n, seed)), most, by, candidates)


def check_search(most: int, by: str, candidates: int = CANDIDATES, name: str = "most") -> None:
    """ValueError unless a set may grow so large (`name` is what the caller calls that), by what is named."""
    if not 1 <= most <= MOST:
        raise ValueError(f"{name}={most} must lie between 1 and {MOST}")
    if candidates < 8:
        raise ValueError(f"candidates={candidates} must be at least 8")
    if by not in get_args(By):
        raise ValueError(f"by={by!r} must be one of {', '.join(get_args(By))}")


def predicted_effects(
    pair: ModelPair, prompts: Prompts, side: Side = "dense"
) -> dict[tuple[int, At], Float[Tensor, " d_sparse"]]:
    """First-order effect of every channel's edit on one model's mean log P(target), from one backward pass.

    Per channel the sum over tokens of its change where the edit enters, times the gradient there; for the dense model
    the change is dz times the decoder's column.
    """
    gradients = _gradients(pair.model(side), prompts.pairs)
    effects: dict[tuple[int, At], Tensor] = {}
    for i, bridge in enumerate(pair.bridge_set):
        site = pair.site(side, i)
        for at in ENTRIES:
            gradient = gradients[at][site]
            if side == "sparse":
                effects[i, at] = torch.einsum("bsc,bsc->c", gradient, inside(prompts, i, at).to(gradient))
                continue
            back = as_read_adjoint(pair.dense.norm(site), bridge.rms_dense, gradient, at).to(prompts.streams[i])
            weight = bridge.decoder_weight.detach().to(prompts.streams[i])
            effects[i, at] = torch.einsum("bsd,dc,bsc->c", back, weight, prompts.streams[i])
    return effects


def _gradients(model: ResidualModel, pairs: TaskPairs) -> dict[At, list[Tensor]]:
    """The gradient of the mean log P(target) at every site's stream and at its read."""
    nudges: list[Tensor] = []

    def nudged(read: Tensor) -> Tensor:
        nudges.append(torch.zeros_like(read, requires_grad=True))
        return read + nudges[-1]

    with torch.enable_grad(), model.reading({i: nudged for i in range(len(model.sites))}):
        trace = model.trace(pairs.input_ids.to(model.device), pairs.attention_mask.to(model.device), True)
        found = torch.autograd.grad(_log_p(p_target(trace.logits, pairs)), [*trace.residuals, *nudges])
    return {"residual": list(found[: len(nudges)]), "read": list(found[len(nudges) :])}


@torch.no_grad()
def find(
    pair: ModelPair, prompts: Prompts, most: int = 1, by: By = "dense", candidates: int = CANDIDATES
) -> FoundChannels:
    """`find_channels` on prompts that were run."""
    before = _log_p(p_target(prompts.traces.dense.logits, prompts.pairs))
    predicted = predicted_effects(pair, prompts)
    ranking = []
    for (i, at), effects in predicted.items():
        site = pair.bridge_set.sites[i]
        for channel in _largest(effects, candidates):
            p = edited(pair, prompts, Channels(site, (channel,), at))
            effect = (_log_p(p) - before).item()
            ranking.append(RankedChannel(site, channel, at, effects[channel].item(), effect, p.mean().item()))
    ranking.sort(key=lambda one: one.p_target, reverse=True)
    agreement: Any = spearmanr([one.predicted for one in ranking], [one.effect for one in ranking])[0]
    search = _Search(pair, prompts, by, candidates, predicted)
    search.known |= {(Channels(one.site, (one.channel,), one.at), "dense"): one.p_target for one in ranking}
    grown = [search.grow(place, most) for place in search.places(most)]
    best = max(grown, key=lambda sets: max(one.margin(by) for one in sets))
    margins = [one.margin(by) for one in best]
    size = next(size for size, margin in enumerate(margins, 1) if margin >= max(margins) - SLACK)
    return FoundChannels(prompts.pairs.task, ranking, float(agreement), best[:size])


class _Search:
    """Grows sets of channels by one model's answer or by both models'."""

    def __init__(self, pair: ModelPair, prompts: Prompts, by: By, candidates: int, predicted: Effects):
        self.pair, self.prompts, self.by, self.candidates = pair, prompts, by, candidates
        self.predicted = self.potential = predicted
        self.known: dict[tuple[Channels, Side], float] = {}
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

    def places(self, most: int) -> list[tuple[int, At]]:
        """Where sets are grown: everywhere where they hold one channel, else where the likeliest channels do most."""
        if most == 1:
            return list(self.potential)

        def promise(place: tuple[int, At]) -> float:
            return self.score(self.channels(place, _largest(self.potential[place], most)))

        return sorted(self.potential, key=promise, reverse=True)[:PLACES]

    def channels(self, place: tuple[int, At], channels: Sequence[int]) -> Channels:
        """Some channels at a place."""
        return Channels(self.pair.bridge_set.sites[place[0]], tuple(channels), place[1])

    def tried(self, place: tuple[int, At]) -> list[int]:
        """The channels of largest predicted effect; by both, on both models, and a few on either."""
        if self.by == "dense":
            return _largest(self.potential[place], self.candidates)
        many, few = self.candidates // 2, self.candidates // 8
        each = ((self.potential, many), (self.predicted, few), (self.in_sparse, few))
        return list(dict.fromkeys(channel for effects, n in each for channel in _largest(effects[place], n)))

    def grow(self, place: tuple[int, At], most: int) -> list[Grown]:
        """Sets of one channel, two, ..., each the best that one more channel makes, while it makes the score larger."""
        sets: list[Grown] = []
        tried, channels, best = self.tried(place), (), -1.0
        while len(channels) < most:
            larger = [self.channels(place, (*channels, c)) for c in tried if c not in channels]
            scored = {one: self.score(one) for one in larger}
            chosen = max(scored, key=scored.__getitem__, default=None)
            if chosen is None or scored[chosen] <= best:
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
        return Grown(chosen, self.p_target(chosen, "dense"), self.p_target(chosen, "sparse"), max(controls))


def _log_p(p: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """The mean logarithm; one probability that is 0 to the last bit must not make every prediction NaN."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).log().mean()


def _largest(effects: Float[Tensor, " d_sparse"], n: int) -> list[int]:
    return effects.topk(min(n, len(effects))).indices.tolist()
