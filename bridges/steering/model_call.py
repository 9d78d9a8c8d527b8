"""What one forward call of a Hugging Face model asks for, and records that are kept with its caches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any, Generic, TypeVar
from weakref import WeakSet, ref

from jaxtyping import Int
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.utils.generic import ModelOutput

from bridges.models.attention_mask import zero_one_mask
from bridges.models.huggingface.recording import text_config
from bridges.models.residual import input_device

Record = TypeVar("Record")


@dataclass(frozen=True)
class ModelCall:
    """The arguments of a forward call, and what they say of the tokens that it reads."""

    arguments: dict[str, Any]
    """All of them, by name."""
    input_ids: Int[Tensor, "b s"]
    attention_mask: Int[Tensor, "b t"] | None
    """Over the cached and the new tokens, 1 at real ones and 0 at padding; None where none is padding."""
    cache: Cache | None
    """None without a cache, or before the model has made it."""
    uses_cache: bool
    """Whether the model keeps a cache from this call on."""
    n_past: int
    """Tokens in the cache before the call."""

    @property
    def logits_by_index(self) -> bool:
        """Whether `logits_to_keep` names tokens by index."""
        return isinstance(self.arguments.get("logits_to_keep"), Tensor)


def parse_call(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> ModelCall:
    """The call as a `ModelCall`; raises ValueError if its tokens cannot be determined from its arguments."""
    given = {**dict(zip(_parameter_names(type(model).forward), args, strict=False)), **kwargs}
    input_ids, cache, use_cache = (given.get(name) for name in ("input_ids", "past_key_values", "use_cache"))
    if input_ids is None:
        raise ValueError("inputs_embeds: steer needs input_ids, to know which tokens an edit reads and changes")
    if use_cache is None:
        use_cache = getattr(text_config(model), "use_cache", False)
    uses_cache = cache is not None or bool(use_cache)
    if uses_cache:
        check_keeps_tokens(model)
    n_past = 0 if cache is None else cached_tokens(model, cache)
    ids = input_ids.to(input_device(model))
    mask = _zero_one(given.get("attention_mask"), ids, n_past)
    return ModelCall(given, ids, mask, cache, uses_cache, n_past)


def _zero_one(mask: Any, input_ids: Tensor, n_past: int) -> Tensor | None:
    """The mask with 1 at real tokens and 0 at padding."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask {shape} must be [batch, seq]: steer counts real tokens by it")
    if mask.shape != (len(input_ids), n_past + input_ids.shape[1]):
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} must cover {n_past} cached and {input_ids.shape[1]} new tokens of "
            f"{len(input_ids)} rows"
        )
    return zero_one_mask(mask, mask)


@lru_cache  # asked at every token
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a method's parameters, without its self."""
    return tuple(inspect.signature(forward).parameters)[1:]


def returned_caches(output: Any) -> Iterator[Cache]:
    """The caches in what a model returned, be it a tuple or a `ModelOutput`."""
    values = output.values() if isinstance(output, ModelOutput) else output if isinstance(output, tuple) else ()
    return (value for value in values if isinstance(value, Cache))


def check_keeps_tokens(model: nn.Module) -> None:
    """ValueError if a model keeps its state elsewhere than in `past_key_values` (`cache_params`, `state`)."""
    names = _parameter_names(type(model).forward)
    if "use_cache" in names and "past_key_values" not in names:
        raise not_followed(model, "has no past_key_values")


def cached_tokens(model: nn.Module, cache: Any) -> int:
    """How many tokens a cache holds; ValueError if it cannot say that, or holds a place for tokens to come."""
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values={type(cache).__name__} must be a Cache of transformers")
    if cache.layers and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        raise not_followed(model, f"has no layer in its {type(cache).__name__} that counts tokens")
    if cache.layers and cache.is_compileable:
        raise ValueError(
            "past_key_values: steer cannot follow the tokens in a static cache; use the default (dynamic) cache, or "
            "edits that add one number everywhere"
        )
    return int(cache.get_seq_length())


def check_counts_tokens(model: nn.Module, cache: Cache, n_tokens: int) -> None:
    """ValueError unless a cache holds `n_tokens` after a call, as one does that counts the tokens of every call."""
    if (found := cached_tokens(model, cache)) != n_tokens:
        raise not_followed(model, f"counts {found} tokens in its {type(cache).__name__} after {n_tokens}")


def not_followed(model: nn.Module, why: str) -> ValueError:
    """The error for a model whose cache cannot be followed."""
    name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return ValueError(
        f"use_cache=True: model={name!r} {why}, so that steer cannot tell where in a row a token stands; pass "
        "use_cache=False, or use edits that add one number everywhere"
    )


_NUMBERS = count()
"""Each `CacheRecords` has a number of its own; an `id` may be given again while an old cache still lives."""


class CacheRecords(Generic[Record]):
    """One record per cache, kept as an attribute of the cache, so that a deep copy of a cache has its record too."""

    def __init__(self) -> None:
        self._name = f"_steer_record_{next(_NUMBERS)}"
        self._caches: WeakSet[Cache] = WeakSet()

    def get(self, cache: Cache | None) -> Record | None:
        """The record of a cache, None where it has none."""
        entry = None if cache is None else vars(cache).get(self._name)
        return None if entry is None else entry.record

    def set(self, cache: Cache, record: Record) -> None:
        """Keep a record with a cache, in place of the one it has."""
        setattr(cache, self._name, _Entry(self._caches, cache, record))
        self._caches.add(cache)

    def items(self) -> list[tuple[Cache, Record]]:
        """Every cache that has a record and still exists."""
        return [(cache, vars(cache)[self._name].record) for cache in self._caches]

    def clear(self) -> None:
        """Remove the records from their caches."""
        for cache in self._caches:
            delattr(cache, self._name)
        self._caches = WeakSet()


class _Entry(Generic[Record]):
    """A record on its cache. A deep copy is listed with the copied cache."""

    def __init__(self, caches: WeakSet[Cache], cache: Cache, record: Record):
        self.caches, self.owner, self.record = caches, ref(cache), record

    def __deepcopy__(self, memo: dict[int, Any]) -> _Entry[Record]:
        owner = self.owner()
        copied = memo.get(id(owner), owner)  # deepcopy makes the new owner before it copies the attributes
        self.caches.add(copied)
        return _Entry(self.caches, copied, deepcopy(self.record, memo))
