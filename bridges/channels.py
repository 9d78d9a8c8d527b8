"""find_channels(): which channel of the sparse model turns the dense model's answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.circuits.tasks import TaskPairs, probability, task_pairs
from bridges.intervention import (
    At,
    as_read_adjoint,
    counterfactual_changes,
    dense_addend,
    edited_logits,
    only,
    sparse_delta,
)
from bridges.models.huggingface import as_residual
from bridges.models.loading import find_tokenizer, frozen
from bridges.models.residual import ResidualModel
from bridges.training.hybrid import ModelPair, Traces, trace_pair

ENTRIES: tuple[At, ...] = ("read", "residual")
CHOSEN_ON = 64
"""Prompts that channels are chosen on, other ones than those reported."""
CANDIDATES = 16
"""Channels per site and entry whose edit is done after the prediction."""
MOST = 8
"""Channels that a set may grow to."""


class Channels(NamedTuple):
    """Some channels at one bridged site and where their edit enters the dense model."""

    site: str
    channels: tuple[int, ...]
    at: At


class RankedChannel(NamedTuple):
    """One channel's counterfactual edit at strength 1: what was predicted of it, and what it did."""

    site: str
    channel: int
    at: At
    predicted: float
    """First-order change of the mean log P(target), nats."""
    effect: float
    """The change that the edit made, nats."""
    p_target: float
    """Mean P(target) under the edit."""


class FoundChannels(NamedTuple):
    """What `find_channels` found on its prompts."""

    task: str
    ranking: list[RankedChannel]
    """Every channel whose edit was done, largest P(target) first."""
    agreement: float
    """Spearman's rank correlation of prediction and effect over the ranking."""
    sets: list[Channels]
    """Sets of 1, 2, ... channels at the site where the last one does most, each grown from the one before."""
    p_target: list[float]
    """Mean P(target) under each set's edit."""

    @property
    def best(self) -> Channels:
        """The largest set."""
        return self.sets[-1]


class Prompts(NamedTuple):
    """A task's pairs, both models' unedited runs, and what the sparse model changes: computed once for every edit."""

    pairs: TaskPairs
    traces: Traces
    reads: list[Float[Tensor, "b s d_sparse"]]
    """dn per bridged site, in read units."""
    streams: list[Float[Tensor, "b s d_sparse"]]
    """dz per bridged site, at strength 1."""


@contextmanager
def model_pair(
    dense: nn.Module | ResidualModel, sparse: nn.Module | ResidualModel, bridge_set: BridgeSet, check_models: bool
) -> Iterator[ModelPair]:
    """Both models frozen and in evaluation mode inside; ValueError if the bridges are of others."""
    pair = ModelPair(as_residual(dense), as_residual(sparse), bridge_set)
    if check_models:
        bridge_set.check_models(pair.dense.model, pair.sparse.model)
    with frozen(pair.dense.model), frozen(pair.sparse.model), torch.no_grad():
        yield pair


def pairs_of(task: str | TaskPairs, dense: nn.Module | ResidualModel, tokenizer: Any, n: int, seed: int) -> TaskPairs:
    """The task's pairs where it is a name; ValueError where there is no tokenizer to make them with."""
    if isinstance(task, TaskPairs):
        return task
    model = dense.model if isinstance(dense, ResidualModel) else dense
    tokenizer = find_tokenizer(model) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError(f"task={task!r} needs tokenizer=: none lies with the dense model")
    return task_pairs(task, tokenizer, n, seed)


def find_channels(
    dense: nn.Module | ResidualModel,
    sparse: nn.Module | ResidualModel,
    bridge_set: BridgeSet,
    task: str | TaskPairs,
    n: int = CHOSEN_ON,
    *,
    most: int = 1,
    candidates: int = CANDIDATES,
    tokenizer: Any = None,
    seed: int = 0,
    check_models: bool = True,
) -> FoundChannels:
    """Rank channels by what their counterfactual edit does to the dense model's answer on `n` pairs of a task.

    One backward pass predicts the effect of every channel at every site, at the read and at the residual: dz times the
    decoder's column times the gradient where the edit enters. The `candidates` of largest prediction are then edited.
    Sets grow greedily, to at most `most` channels at one site. Report on other prompts than these.
    """
    check_most(most)
    with model_pair(dense, sparse, bridge_set, check_models) as pair:
        return find(pair, prompts_of(pair, pairs_of(task, dense, tokenizer, n, seed)), most, candidates)


def check_most(most: int) -> None:
    """ValueError unless a set may grow so large."""
    if not 1 <= most <= MOST:
        raise ValueError(f"most={most} must lie between 1 and {MOST}")


@torch.no_grad()
def prompts_of(pair: ModelPair, pairs: TaskPairs) -> Prompts:
    """Run both models on the presented prompts, the sparse one on their counterfactuals too."""
    pairs = pairs.to(pair.dense.device)
    traces = trace_pair(pair, pairs.input_ids, pairs.attention_mask)
    changes = counterfactual_changes(pair, pairs.input_ids, pairs.counterfactual_ids, pairs.attention_mask)
    return Prompts(pairs, traces, [c.delta for c in changes], [sparse_delta(pair, c.site, c.delta) for c in changes])


def p_target(logits: Float[Tensor, "b s vocab"], pairs: TaskPairs) -> Float[Tensor, " b"]:
    """The full-vocabulary probability of each pair's target after the last token."""
    return probability(logits[:, -1], pairs.targets)


def predicted_effects(pair: ModelPair, prompts: Prompts) -> dict[tuple[int, At], Float[Tensor, " d_sparse"]]:
    """First-order effect of every channel's edit on the mean log P(target), from one backward pass.

    Per channel the sum over tokens of dz, times the decoder's column, times the gradient where the edit enters.
    """
    gradients = _gradients(pair.dense, prompts.pairs)
    effects = {}
    for i, bridge in enumerate(pair.bridge_set):
        site = pair.site("dense", i)
        for at in ENTRIES:
            back = as_read_adjoint(pair.dense.norm(site), bridge.rms_dense, gradients[at][site], at)
            back, weight = back.to(prompts.streams[i]), bridge.decoder_weight.detach().to(prompts.streams[i])
            effects[i, at] = torch.einsum("bsd,dc,bsc->c", back, weight, prompts.streams[i])
    return effects


def _gradients(model: ResidualModel, pairs: TaskPairs) -> dict[At, list[Tensor]]:
    """The gradient of the mean log P(target) at every site's stream and at its read."""
    nudges: dict[At, list[Tensor]] = {"residual": [], "read": []}

    def nudged(at: At, tensor: Tensor) -> Tensor:
        nudges[at].append(torch.zeros_like(tensor, requires_grad=True))
        return tensor + nudges[at][-1]

    with torch.enable_grad(), model.reading({i: lambda read: nudged("read", read) for i in range(len(model.sites))}):
        context = model.context(pairs.input_ids, pairs.attention_mask)
        stream = nudged("residual", context.embedding)
        for index in range(len(model.sites) - 1):
            stream = nudged("residual", model.sublayer(index, stream, context))
        log_p = p_target(model.head(stream, context), pairs).log().mean()
        found = torch.autograd.grad(log_p, [*nudges["residual"], *nudges["read"]])
    return {"residual": list(found[: len(model.sites)]), "read": list(found[len(model.sites) :])}


@torch.no_grad()
def find(pair: ModelPair, prompts: Prompts, most: int = 1, candidates: int = CANDIDATES) -> FoundChannels:
    """`find_channels` on prompts that were run."""
    before = p_target(prompts.traces.dense.logits, prompts.pairs).log().mean()
    ranking, best = [], []
    for (i, at), effects in predicted_effects(pair, prompts).items():
        site = pair.bridge_set.sites[i]
        tried = effects.topk(min(candidates, len(effects))).indices.tolist()
        singles: dict[tuple[int, ...], float] = {}
        for channel in tried:
            p = edited(pair, prompts, Channels(site, (channel,), at))
            effect = (p.log().mean() - before).item()
            ranking.append(RankedChannel(site, channel, at, effects[channel].item(), effect, p.mean().item()))
            singles[channel,] = p.mean().item()
        grown = list(_grow(pair, prompts, site, at, tried, most, singles))
        best = max(best, grown, key=lambda sets: sets[-1][1] if sets else -1.0)
    ranking.sort(key=lambda one: one.p_target, reverse=True)
    agreement: Any = spearmanr([one.predicted for one in ranking], [one.effect for one in ranking])[0]
    sets, ps = zip(*best, strict=True)
    return FoundChannels(prompts.pairs.task, ranking, float(agreement), list(sets), list(ps))


def _grow(
    pair: ModelPair, prompts: Prompts, site: str, at: At, tried: Sequence[int], most: int, singles: dict
) -> Iterator[tuple[Channels, float]]:
    """Sets of one channel, two, ..., each the best that one more channel makes, while it makes P(target) larger.

    `singles`: P(target) of the sets of one, known from the ranking.
    """
    channels: tuple[int, ...] = ()
    p = -1.0
    while len(channels) < most:
        sets: list[tuple[int, ...]] = [(*channels, channel) for channel in tried if channel not in channels]
        scored: dict[tuple[int, ...], float] = (
            {one: edited(pair, prompts, Channels(site, one, at)).mean().item() for one in sets} if channels else singles
        )
        channels = max(scored, key=scored.__getitem__, default=channels)
        if scored.get(channels, p) <= p:
            return
        p = scored[channels]
        yield Channels(site, channels, at), p


def addend_of(pair: ModelPair, prompts: Prompts, chosen: Channels) -> Float[Tensor, "b s d_dense"]:
    """What the counterfactual edit of some channels adds to the dense read or stream, at strength 1."""
    i = pair.bridge_set.index(chosen.site)
    return dense_addend(pair, i, only(prompts.streams[i], chosen.channels), chosen.at)


def edited(pair: ModelPair, prompts: Prompts, chosen: Channels, strength: float = 1.0) -> Float[Tensor, " b"]:
    """P(target) of every prompt under the counterfactual edit of some channels."""
    site = pair.site("dense", pair.bridge_set.index(chosen.site))
    addend = strength * addend_of(pair, prompts, chosen)
    return p_target(edited_logits(pair.dense, prompts.traces.dense, site, addend, chosen.at), prompts.pairs)
