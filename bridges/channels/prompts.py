"""Counterfactual edits of channels on a task's prompts, and what ablating channels does to other text.

Everything that does not depend on the edit is run once per task (`Prompts`) or once per text (`ReferenceText`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.models.loading import as_residual, find_tokenizer
from bridges.models.modes import frozen
from bridges.models.residual import ResidualModel, Trace, check_tokens, check_vocabulary
from bridges.models.sparse.model import SparseTransformer
from bridges.objective.hybrid import SIDES, ModelPair, Side, Traces, trace_pair
from bridges.sparsity.support import use_sparse_kernels
from bridges.steering.delta import EntryPoint, changed_reads, dense_addend, edited_logits, mask_channels, sparse_delta
from bridges.tasks.pairs import TaskPairs, probability, task_pairs


class Channels(NamedTuple):
    """Channels of the sparse model that are edited together, at one site.

    >>> Channels("1.attn", (7, 120), at="residual").channels
    (7, 120)
    """

    site: str
    """The bridged site, by its name in the sparse model: "1.attn"."""
    channels: tuple[int, ...]
    """Coordinates of the sparse residual stream."""
    at: EntryPoint
    """Where the edit enters the dense model: "read" (the input of the site's sublayer alone) or "residual" (the
    stream)."""


class Prompts(NamedTuple):
    """A task's pairs, the unedited runs of both models, and the changes that counterfactual edits are made of."""

    pairs: TaskPairs
    traces: Traces
    dn: list[Float[Tensor, "b s d_sparse"]]
    """Per bridged site the change of the sparse model's read from original to counterfactual prompt, in read units."""
    dz: list[Float[Tensor, "b s d_sparse"]]
    """The same as a change of the sparse stream, at strength 1."""


class ReferenceText(NamedTuple):
    """Text that has nothing to do with a task: what it costs to ablate channels is measured on it."""

    trace: Trace
    """The dense model's unedited run."""
    ablation_delta: list[Float[Tensor, "b s d_sparse"]]
    """Per bridged site the change of the sparse stream that brings every channel's read to 0."""


@contextmanager
def frozen_pair(
    dense: nn.Module | ResidualModel | str | Path,
    sparse: nn.Module | ResidualModel | str | Path,
    bridge_set: BridgeSet,
    check_models: bool,
) -> Iterator[ModelPair]:
    """Yield both models with their bridges, frozen and in evaluation mode until the context ends.

    Raises ValueError if the bridges were fitted to other models, unless `check_models` is False.
    """
    pair = ModelPair(_with_cached_norm(as_residual(dense)), _with_cached_norm(as_residual(sparse)), bridge_set)
    if check_models:
        bridge_set.check_models(pair.dense.model, pair.sparse.model)
    models = (pair.dense.model, pair.sparse.model)
    kernels = [use_sparse_kernels(model) for model in models if isinstance(model, SparseTransformer)]
    with ExitStack() as stack:
        for context in (*map(frozen, models), *kernels, torch.no_grad()):
            stack.enter_context(context)
        yield pair


def _with_cached_norm(model: ResidualModel) -> ResidualModel:
    """A copy that measures each site's norm once: measuring runs a layer, and frozen weights do not change."""
    model = copy(model)
    vars(model)["norm"] = cache(model.norm)
    return model


def entry_points(pair: ModelPair, bridge: int) -> tuple[EntryPoint, ...]:
    """Where an edit at one bridged site can enter the dense model.

    Not at a read that two modules take through norms of their own (a parallel block): `steer` edits both reads there,
    while the edits of this package are one addend.
    """
    readers = [len(pair.model(side).read_modules(pair.site(side, bridge))) for side in SIDES]
    return ("read", "residual") if readers == [1, 1] else ("residual",)


def check_channels(pair: ModelPair, chosen: Channels) -> None:
    """Raise ValueError unless the channels exist and their edit can enter at their site."""
    if not isinstance(chosen, Channels):
        raise ValueError(
            f"channels={chosen!r} must be bridges.Channels(site, channels, at), as find_channels(...).best"
        )
    if chosen.site not in pair.bridge_set.sites:
        raise ValueError(f"site={chosen.site!r} has no bridge; there are {', '.join(pair.bridge_set.sites)}")
    if chosen.at not in get_args(EntryPoint):
        raise ValueError(f"at={chosen.at!r} must be one of {', '.join(get_args(EntryPoint))}")
    if chosen.at not in entry_points(pair, pair.bridge_set.index(chosen.site)):
        raise ValueError(f"at={chosen.at!r}: site={chosen.site!r} is read by two modules at once; use at='residual'")
    width, channels = pair.sparse.d_model, chosen.channels
    if not isinstance(channels, Sequence) or len(channels) != len(set(channels)) or not channels:
        raise ValueError(f"channels={channels!r} must be a tuple of different channels, at least one")
    if wrong := [c for c in channels if isinstance(c, bool) or not isinstance(c, Integral) or not 0 <= c < width]:
        raise ValueError(f"channel={wrong[0]!r} must lie between 0 and {width - 1}, the sparse stream's channels")


def check_text(pair: ModelPair, text: Any) -> Int[Tensor, "rows seq"]:
    """Return the text; raise ValueError unless it is rows of the models' tokens that fit both contexts."""
    check_tokens("text", text, None, pair.dense, pair.sparse)
    return text


def resolve_tokenizer(dense: nn.Module | ResidualModel | str | Path, tokenizer: Any) -> Any:
    """Return the given tokenizer, else the one saved with the dense model, else None."""
    return find_tokenizer(dense) if tokenizer is None else tokenizer


def resolve_task(
    task: str | TaskPairs, dense: nn.Module | ResidualModel | str | Path, tokenizer: Any, n: int, seed: int
) -> TaskPairs:
    """Return the given pairs, or make `n` of the named task; raise ValueError if that lacks a tokenizer."""
    if isinstance(task, TaskPairs):
        return task
    tokenizer = resolve_tokenizer(dense, tokenizer)
    if tokenizer is None:
        raise ValueError(f"task={task!r} needs tokenizer=: no tokenizer is saved with the dense model")
    return task_pairs(task, tokenizer, n, seed)


@torch.no_grad()
def run_prompts(pair: ModelPair, pairs: TaskPairs) -> Prompts:
    """Run both models on the original prompts, and the sparse model on their counterfactuals too.

    Raises ValueError if prompts or answers hold tokens that a model does not know, or if prompts exceed a context.
    """
    name = f"task={pairs.task!r} with this tokenizer"
    for ids in (pairs.input_ids, pairs.counterfactual_ids):
        check_tokens(name, ids, None, pair.dense, pair.sparse, least=1)
    for tokens in (pairs.answers, pairs.targets):
        check_vocabulary(name, tokens.clamp(min=0), pair.dense, pair.sparse)
    pairs = pairs.to(pair.dense.device)
    traces = trace_pair(pair, pairs.input_ids, pairs.attention_mask)
    changes = changed_reads(pair.sparse, pairs.input_ids, pairs.counterfactual_ids, pairs.attention_mask)
    dn = [changes[pair.site("sparse", i)] for i in range(len(pair.bridge_set))]
    return Prompts(pairs, traces, dn, [sparse_delta(pair, i, change) for i, change in enumerate(dn)])


@torch.no_grad()
def run_reference_text(
    pair: ModelPair, input_ids: Int[Tensor, "b s"], attention_mask: Int[Tensor, "b s"] | None = None
) -> ReferenceText:
    """Run both models on text that ablations are measured on."""

    def inputs(model: ResidualModel) -> list[Any]:
        return [x if x is None else x.to(model.device) for x in (input_ids, attention_mask)]

    reads = pair.sparse.reads(*inputs(pair.sparse))
    deltas = [sparse_delta(pair, i, -reads[pair.site("sparse", i)]) for i in range(len(pair.bridge_set))]
    return ReferenceText(pair.dense.trace(*inputs(pair.dense)), deltas)


def ablated_logits(pair: ModelPair, text: ReferenceText, chosen: Channels) -> Float[Tensor, "b s vocab"]:
    """Return the dense model's logits on a text with channels ablated: their reads are 0 at every position."""
    i = pair.bridge_set.index(chosen.site)
    addend = dense_addend(pair, i, mask_channels(text.ablation_delta[i], chosen.channels), chosen.at)
    return edited_logits(pair.dense, text.trace, pair.site("dense", i), addend, chosen.at)


def p_target(logits: Float[Tensor, "b s vocab"], pairs: TaskPairs) -> Float[Tensor, " b"]:
    """Return the full-vocabulary probability of each pair's target after the last token."""
    return probability(logits[:, -1], pairs.targets)


def sparse_delta_at(prompts: Prompts, bridge: int, at: EntryPoint) -> Float[Tensor, "b s d_sparse"]:
    """Return what the counterfactual edit of every channel adds to the sparse model's read or stream."""
    return (prompts.dz if at == "residual" else prompts.dn)[bridge]


def edit_addend(pair: ModelPair, prompts: Prompts, chosen: Channels, side: Side = "dense") -> Float[Tensor, "b s d"]:
    """Return what the counterfactual edit of the channels adds to one model's read or stream, at strength 1."""
    i = pair.bridge_set.index(chosen.site)
    if side == "sparse":
        return mask_channels(sparse_delta_at(prompts, i, chosen.at), chosen.channels)
    return dense_addend(pair, i, mask_channels(prompts.dz[i], chosen.channels), chosen.at)


def logits_under_edit(
    pair: ModelPair, prompts: Prompts, chosen: Channels, strength: float = 1.0, side: Side = "dense"
) -> Float[Tensor, "b s vocab"]:
    """Return one model's logits on the original prompts under the counterfactual edit of the channels."""
    site = pair.site(side, pair.bridge_set.index(chosen.site))
    addend = strength * edit_addend(pair, prompts, chosen, side)
    return edited_logits(pair.model(side), prompts.traces.side(side), site, addend, chosen.at)


def p_target_under_edit(
    pair: ModelPair, prompts: Prompts, chosen: Channels, strength: float = 1.0, side: Side = "dense"
) -> Float[Tensor, " b"]:
    """Return P(target) of every prompt under the counterfactual edit of the channels."""
    return p_target(logits_under_edit(pair, prompts, chosen, strength, side), prompts.pairs)
