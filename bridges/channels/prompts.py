"""What searches and sweeps are given: channels, models, a task, text; checked and made ready."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.models.loading import as_residual, find_tokenizer
from bridges.models.modes import frozen
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.models.tokens import check_tokens
from bridges.objective.pair import SIDES, ModelPair
from bridges.sparsity.support import use_sparse_kernels
from bridges.steering.delta import EntryPoint
from bridges.tasks.pairs import TaskPairs, task_pairs


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


@contextmanager
def frozen_pair(
    dense: nn.Module | ResidualModel | str | Path,
    sparse: nn.Module | ResidualModel | str | Path,
    bridge_set: BridgeSet,
    check_models: bool,
) -> Iterator[ModelPair]:
    """Yield both models with their bridges, frozen and in evaluation mode until the context ends.

    A caller's torch.inference_mode() is off inside, since searches need gradients. Raises ValueError if the bridges
    were fitted to other models, unless `check_models` is False.
    """
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.enable_grad()):
            stack.enter_context(context)
        pair = ModelPair(_with_cached_norm(as_residual(dense)), _with_cached_norm(as_residual(sparse)), bridge_set)
        if check_models:
            bridge_set.check_models(pair.dense.model, pair.sparse.model)
        models = (pair.dense.model, pair.sparse.model)
        kernels = [use_sparse_kernels(model) for model in models if isinstance(model, SparseTransformer)]
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
        raise ValueError(f"task={task!r} needs tokenizer=: no tokenizer is saved with the model")
    return task_pairs(task, tokenizer, n, seed)
