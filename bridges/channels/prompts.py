"""Counterfactual edits of some channels on a task's prompts, and P(target) under them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import cache
from numbers import Integral
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.models.loading import as_residual, find_tokenizer
from bridges.models.modes import frozen
from bridges.models.residual import ResidualModel, Trace, check_tokens, refuse_foreign_tokens
from bridges.models.sparse.model import SparseTransformer
from bridges.objective.hybrid import SIDES, ModelPair, Side, Traces, trace_pair
from bridges.sparsity.support import use_sparse_kernels
from bridges.steering.delta import EntryPoint, changed_reads, dense_addend, edited_logits, mask_channels, sparse_delta
from bridges.tasks.pairs import TaskPairs, probability, task_pairs


class Channels(NamedTuple):
    """Some channels at one bridged site and where their edit enters the dense model."""

    site: str
    channels: tuple[int, ...]
    at: EntryPoint


class Prompts(NamedTuple):
    """A task's pairs, both models' unedited runs, and what the sparse model changes: computed once for every edit."""

    pairs: TaskPairs
    traces: Traces
    dn: list[Float[Tensor, "b s d_sparse"]]
    """Change of the sparse model's read per bridged site, in read units."""
    dz: list[Float[Tensor, "b s d_sparse"]]
    """The same as a change of its stream, at strength 1."""


class Text(NamedTuple):
    """Tokens that have nothing to do with a task, and what turning channels off adds: computed once for every edit."""

    trace: Trace
    """The dense model's unedited run."""
    off: list[Float[Tensor, "b s d_sparse"]]
    """dz per bridged site that brings every channel's read to 0."""


@contextmanager
def frozen_pair(
    dense: nn.Module | ResidualModel, sparse: nn.Module | ResidualModel, bridge_set: BridgeSet, check_models: bool
) -> Iterator[ModelPair]:
    """Both models frozen and in evaluation mode inside; ValueError if the bridges are of others."""
    pair = ModelPair(_knowing_norms(as_residual(dense)), _knowing_norms(as_residual(sparse)), bridge_set)
    if check_models:
        bridge_set.check_models(pair.dense.model, pair.sparse.model)
    fast = [use_sparse_kernels(one.model) for one in pair[:2] if isinstance(one.model, SparseTransformer)]
    with ExitStack() as stack:
        for context in (frozen(pair.dense.model), frozen(pair.sparse.model), *fast, torch.no_grad()):
            stack.enter_context(context)
        yield pair


def _knowing_norms(chain: ResidualModel) -> ResidualModel:
    """The same chain, for as long as its model is frozen: it measures a norm, a pass of its own, once."""
    chain = copy(chain)
    vars(chain)["norm"] = cache(chain.norm)
    return chain


def entries(pair: ModelPair, i: int) -> tuple[EntryPoint, ...]:
    """Where an edit of a bridged site may enter here: not at a read that two modules take through norms of their own.

    `steer` edits both; what is computed here has one addend per edit.
    """
    readers = [len(pair.model(side).read_modules(pair.site(side, i))) for side in SIDES]
    return ("read", "residual") if readers == [1, 1] else ("residual",)


def check_channels(pair: ModelPair, chosen: Channels) -> None:
    """ValueError unless these are channels of a bridged site, where their edit can enter."""
    if not isinstance(chosen, Channels):
        raise ValueError(
            f"channels={chosen!r} must be bridges.Channels(site, channels, at), as find_channels(...).best"
        )
    if chosen.site not in pair.bridge_set.sites:
        raise ValueError(f"site={chosen.site!r} has no bridge; there are {', '.join(pair.bridge_set.sites)}")
    if chosen.at not in get_args(EntryPoint):
        raise ValueError(f"at={chosen.at!r} must be one of {', '.join(get_args(EntryPoint))}")
    if chosen.at not in entries(pair, pair.bridge_set.index(chosen.site)):
        raise ValueError(f"at={chosen.at!r}: site={chosen.site!r} is read by two modules at once; use at='residual'")
    width, channels = pair.sparse.d_model, chosen.channels
    if not isinstance(channels, Sequence) or len(channels) != len(set(channels)) or not channels:
        raise ValueError(f"channels={channels!r} must be a tuple of different channels, at least one")
    if wrong := [c for c in channels if isinstance(c, bool) or not isinstance(c, Integral) or not 0 <= c < width]:
        raise ValueError(f"channel={wrong[0]!r} must lie between 0 and {width - 1}, the sparse stream's channels")


def check_text(pair: ModelPair, text: Any) -> Int[Tensor, "rows seq"]:
    """The text; ValueError unless it is rows of the models' tokens, no longer than both contexts."""
    check_tokens("text", text, None, pair.dense, pair.sparse)
    return text


def tokenizer_of(dense: nn.Module | ResidualModel, given: Any) -> Any:
    """The one that was given, else the one that lies with the dense model, if there is one."""
    return find_tokenizer(dense.model if isinstance(dense, ResidualModel) else dense) if given is None else given


def pairs_of(task: str | TaskPairs, dense: nn.Module | ResidualModel, tokenizer: Any, n: int, seed: int) -> TaskPairs:
    """The task's pairs where it is a name; ValueError where there is no tokenizer to make them with."""
    if isinstance(task, TaskPairs):
        return task
    tokenizer = tokenizer_of(dense, tokenizer)
    if tokenizer is None:
        raise ValueError(f"task={task!r} needs tokenizer=: none lies with the dense model")
    return task_pairs(task, tokenizer, n, seed)


@torch.no_grad()
def prompts_of(pair: ModelPair, pairs: TaskPairs) -> Prompts:
    """Run both models on the presented prompts, the sparse one on their counterfactuals too.

    ValueError for prompts or answers that are none of the models' tokens, or prompts longer than a context.
    """
    what = f"task={pairs.task!r} with this tokenizer"
    for ids in (pairs.input_ids, pairs.counterfactual_ids):
        check_tokens(what, ids, None, pair.dense, pair.sparse, least=1)
    for tokens in (pairs.answers, pairs.targets):
        refuse_foreign_tokens(what, tokens.clamp(min=0), pair.dense, pair.sparse)
    pairs = pairs.to(pair.dense.device)
    traces = trace_pair(pair, pairs.input_ids, pairs.attention_mask)
    changed = changed_reads(pair.sparse, pairs.input_ids, pairs.counterfactual_ids, pairs.attention_mask)
    dn = [changed[pair.site("sparse", i)] for i in range(len(pair.bridge_set))]
    return Prompts(pairs, traces, dn, [sparse_delta(pair, i, one) for i, one in enumerate(dn)])


@torch.no_grad()
def text_of(pair: ModelPair, input_ids: Int[Tensor, "b s"], attention_mask: Int[Tensor, "b s"] | None = None) -> Text:
    """Run both models on tokens."""

    def on(model: ResidualModel) -> list[Any]:
        return [x if x is None else x.to(model.device) for x in (input_ids, attention_mask)]

    reads = pair.sparse.reads(*on(pair.sparse))
    off = [sparse_delta(pair, i, -reads[pair.site("sparse", i)]) for i in range(len(pair.bridge_set))]
    return Text(pair.dense.trace(*on(pair.dense)), off)


def logits_off(pair: ModelPair, text: Text, chosen: Channels) -> Float[Tensor, "b s vocab"]:
    """The dense model's logits with some channels turned off (set to 0) at every position."""
    i = pair.bridge_set.index(chosen.site)
    addend = dense_addend(pair, i, mask_channels(text.off[i], chosen.channels), chosen.at)
    return edited_logits(pair.dense, text.trace, pair.site("dense", i), addend, chosen.at)


def p_target(logits: Float[Tensor, "b s vocab"], pairs: TaskPairs) -> Float[Tensor, " b"]:
    """The full-vocabulary probability of each pair's target after the last token."""
    return probability(logits[:, -1], pairs.targets)


def inside(prompts: Prompts, i: int, at: EntryPoint) -> Float[Tensor, "b s d_sparse"]:
    """The change of every channel of the sparse model where an edit enters it."""
    return (prompts.dz if at == "residual" else prompts.dn)[i]


def addend_of(pair: ModelPair, prompts: Prompts, chosen: Channels, side: Side = "dense") -> Float[Tensor, "b s d"]:
    """What the counterfactual edit of some channels adds to one model's read or stream, at strength 1."""
    i = pair.bridge_set.index(chosen.site)
    if side == "sparse":
        return mask_channels(inside(prompts, i, chosen.at), chosen.channels)
    return dense_addend(pair, i, mask_channels(prompts.dz[i], chosen.channels), chosen.at)


def logits_under(
    pair: ModelPair, prompts: Prompts, chosen: Channels, strength: float = 1.0, side: Side = "dense"
) -> Float[Tensor, "b s vocab"]:
    """One model's logits under the counterfactual edit of some channels."""
    site = pair.site(side, pair.bridge_set.index(chosen.site))
    addend = strength * addend_of(pair, prompts, chosen, side)
    return edited_logits(pair.model(side), prompts.traces.side(side), site, addend, chosen.at)


def edited(
    pair: ModelPair, prompts: Prompts, chosen: Channels, strength: float = 1.0, side: Side = "dense"
) -> Float[Tensor, " b"]:
    """P(target) of every prompt under that edit."""
    return p_target(logits_under(pair, prompts, chosen, strength, side), prompts.pairs)
