"""Find the sparse channel that turns the dense model's answer, and measure it beside its baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.circuits.tasks import TaskPairs
from bridges.intervention import (
    At,
    as_read_adjoint,
    counterfactual_changes,
    dense_addend,
    edited_logits,
    only,
    sparse_delta,
)
from bridges.models.residual import ResidualModel, Trace
from bridges.training.hybrid import ModelPair, Traces, trace_pair

ENTRIES: tuple[At, ...] = ("read", "residual")
RANDOM_DIRECTIONS = 20


class Channels(NamedTuple):
    """Some channels at one bridged site, where their edit enters the dense model, and P(target) when they do."""

    site: int
    channels: tuple[int, ...]
    at: At
    p_target: float
    """Mean at strength 1 over the prompts they were chosen on."""


class Prompts(NamedTuple):
    """A task's pairs, both models' unedited runs, and what the sparse model changes: computed once for every edit."""

    pairs: TaskPairs
    traces: Traces
    reads: list[Float[Tensor, "b s d_sparse"]]
    """dn per bridged site, in read units."""
    streams: list[Float[Tensor, "b s d_sparse"]]
    """dz per bridged site, at strength 1."""


@torch.no_grad()
def prompts_of(pair: ModelPair, pairs: TaskPairs) -> Prompts:
    """Run the sparse model on both sides of the pairs."""
    traces = trace_pair(pair, pairs.input_ids, pairs.attention_mask)
    changes = counterfactual_changes(pair, pairs.input_ids, pairs.counterfactual_ids, pairs.attention_mask)
    return Prompts(pairs, traces, [c.delta for c in changes], [sparse_delta(pair, c.site, c.delta) for c in changes])


def p_target(logits: Float[Tensor, "b s vocab"], pairs: TaskPairs) -> Float[Tensor, " b"]:
    """The full-vocabulary probability of each pair's target after the last token."""
    return logits[:, -1].float().softmax(-1).gather(1, pairs.targets[:, None]).squeeze(1)


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
            effects[i, at] = torch.einsum("bsd,dc,bsc->c", back, bridge.decoder_weight.detach(), prompts.streams[i])
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
def find_channels(pair: ModelPair, prompts: Prompts, most: int = 1, candidates: int = 16) -> Channels:
    """The set of at most `most` channels at one site that moves P(target) furthest on these prompts.

    At every site and entry the channels of largest predicted effect are tried; sets grow greedily, one channel at a
    time. Choose on other prompts than those you report.
    """
    effects = predicted_effects(pair, prompts)
    best = None
    for (site, at), effect in effects.items():
        tried = effect.topk(min(candidates, len(effect))).indices.tolist()
        grown = _grow(pair, prompts, site, at, tried, most)
        if best is None or grown.p_target > best.p_target:
            best = grown
    assert best is not None, "a bridge set has at least one site"
    return best


def _grow(pair: ModelPair, prompts: Prompts, site: int, at: At, tried: Sequence[int], most: int) -> Channels:
    best = Channels(site, (), at, 0.0)
    for _ in range(most):
        sets = [(*best.channels, channel) for channel in tried if channel not in best.channels]
        scored = [Channels(site, channels, at, _effect(pair, prompts, site, at, channels)) for channels in sets]
        step = max(scored, key=lambda one: one.p_target, default=best)
        if step.p_target <= best.p_target:
            break
        best = step
    return best


def _effect(pair: ModelPair, prompts: Prompts, site: int, at: At, channels: tuple[int, ...]) -> float:
    addend = dense_addend(pair, site, only(prompts.streams[site], channels), at)
    return _curve(pair, prompts, site, addend, at, [1.0])[0]


def _curve(
    pair: ModelPair, prompts: Prompts, site: int, addend: Tensor, at: At, strengths: Sequence[float]
) -> list[float]:
    where = pair.site("dense", site)
    return _mean_curve(pair.dense, prompts.traces.dense, prompts.pairs, where, addend, at, strengths)


def _mean_curve(
    model: ResidualModel,
    trace: Trace,
    pairs: TaskPairs,
    site: int,
    addend: Tensor,
    at: At,
    strengths: Sequence[float],
) -> list[float]:
    """Mean P(target) at every strength of an addend."""
    edits = (edited_logits(model, trace, site, strength * addend, at) for strength in strengths)
    return [p_target(logits, pairs).mean().item() for logits in edits]


@torch.no_grad()
def sweep(
    pair: ModelPair, chosen_on: Prompts, reported: Prompts, found: Channels, strengths: Sequence[float]
) -> dict[str, Any]:
    """P(target) over strengths for a set of channels, with every baseline beside it: the content of `steering.json`.

    `chosen_on`: the prompts that `found` and the mean difference's site were chosen on.
    """
    site, at, pairs = found.site, found.at, reported.pairs
    dz = only(reported.streams[site], found.channels)
    addend = dense_addend(pair, site, dz, at)
    inside = dz if at == "residual" else only(reported.reads[site], found.channels)
    difference_site, difference = _mean_difference(pair.dense, chosen_on)
    full = p_target(edited_logits(pair.dense, reported.traces.dense, pair.site("dense", site), addend, at), pairs)
    return {
        "task": pairs.task,
        "site": pair.bridge_set.sites[site],
        "channel": found.channels[0] if len(found.channels) == 1 else list(found.channels),
        "at": at,
        "strengths": list(strengths),
        "p_target": _curve(pair, reported, site, addend, at, strengths),
        "p_target_random_direction": _random_curve(pair, reported, site, addend, at, strengths),
        "p_target_mean_difference": _mean_curve(
            pair.dense, reported.traces.dense, pairs, difference_site, difference(pairs), "residual", strengths
        ),
        "p_target_all_channels": _curve(
            pair, reported, site, dense_addend(pair, site, reported.streams[site], at), at, strengths
        ),
        "p_target_sparse_model": _mean_curve(
            pair.sparse, reported.traces.sparse, pairs, pair.site("sparse", site), inside, at, strengths
        ),
        "prompts": len(pairs.input_ids),
        "mean_difference_site": pair.dense.sites[difference_site],
        "p_target_by_target_token": {str(t): full[pairs.targets == t].mean().item() for t in _targets(pairs)},
        "p_target_where_chosen": found.p_target,
    }


def _targets(pairs: TaskPairs) -> list[int]:
    return sorted(set(pairs.targets.tolist()))


def _random_curve(
    pair: ModelPair, prompts: Prompts, site: int, addend: Tensor, at: At, strengths: Sequence[float]
) -> list[float]:
    """Mean over random directions, each with the addend's own norm at every token."""
    generator = torch.Generator().manual_seed(0)
    curves = []
    for _ in range(RANDOM_DIRECTIONS):
        direction = torch.randn(addend.shape[-1], generator=generator).to(addend)
        values = addend.norm(dim=-1, keepdim=True) * direction / direction.norm()
        curves.append(_curve(pair, prompts, site, values, at, strengths))
    return [sum(column) / len(column) for column in zip(*curves, strict=True)]


def _mean_difference(model: ResidualModel, prompts: Prompts) -> tuple[int, Callable[[TaskPairs], Tensor]]:
    """The dense model's own steering vector: the mean difference at the last token, at the site where it does most.

    One vector per target, since a pair may be presented either way round. Returns the site and what to add to the
    stream of given pairs.
    """
    pairs, trace = prompts.pairs, prompts.traces.dense
    swapped = model.trace(pairs.counterfactual_ids, pairs.attention_mask).residuals

    def adder(site: int) -> Callable[[TaskPairs], Tensor]:
        last = (swapped[site] - trace.residuals[site])[:, -1]
        vectors = {token: last[pairs.targets == token].mean(0) for token in _targets(pairs)}

        def add(to: TaskPairs) -> Tensor:
            values = torch.zeros(*to.input_ids.shape, last.shape[-1], dtype=last.dtype, device=last.device)
            values[:, -1] = torch.stack([vectors[token] for token in to.targets.tolist()])
            return values

        return add

    def effect(site: int) -> float:
        return _mean_curve(model, trace, pairs, site, adder(site)(pairs), "residual", [1.0])[0]

    best = max(range(len(model.sites)), key=effect)
    return best, adder(best)
