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
from transformers.utils.generic import ModelOutput

from bridges.models.residual import input_device

Record = TypeVar("Record")


@dataclass(frozen=True)
class ModelCall:
    """The arguments of a forward call that determine which tokens it reads."""

    input_ids: Int[Tensor, "b s"]
    attention_mask: Int[Tensor, "b t"] | None
    """Over the cached and the new tokens; None where none is padding."""
    cache: Cache | None
    """None without a cache, or before the model has made it."""
    uses_cache: bool
    """Whether the model keeps a cache from this call on."""
    n_past: int
    """Tokens in the cache before the call."""
    logits_by_index: bool = False
    """Whether `logits_to_keep` names tokens by index."""


def parse_call(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> ModelCall:
    """The call as a `ModelCall`; raises ValueError if its tokens cannot be determined from its arguments."""
    given = {**dict(zip(_parameter_names(type(model).forward), args, strict=False)), **kwargs}
    input_ids, cache, mask = (given.get(name) for name in ("input_ids", "past_key_values", "attention_mask"))
    if input_ids is None:
        raise ValueError("inputs_embeds: steer needs input_ids, to know which tokens an edit reads and changes")
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            "past_key_values: steer cannot follow the tokens in a static cache; use the default (dynamic) cache, or "
            "edits that add one number everywhere"
        )
    n_past = 0 if cache is None else int(cache.get_seq_length())
    use_cache = given.get("use_cache")
    use_cache = getattr(model.config, "use_cache", False) if use_cache is None else use_cache  # pyright: ignore
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"attention_mask {tuple(mask.shape)} must be [batch, seq]: steer counts real tokens by it")
    if mask is not None and mask.shape[1] != n_past + input_ids.shape[1]:
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} must cover {n_past} cached and {input_ids.shape[1]} new tokens"
        )
    by_index = isinstance(given.get("logits_to_keep"), Tensor)
    ids = input_ids.to(input_device(model))
    return ModelCall(ids, mask, cache, cache is not None or bool(use_cache), n_past, by_index)


@lru_cache  # asked at every token
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a method's parameters, without its self."""
    return tuple(inspect.signature(forward).parameters)[1:]


def returned_caches(output: Any) -> Iterator[Cache]:
    """The caches in what a model returned, be it a tuple or a `ModelOutput`."""
    values = output.values() if isinstance(output, ModelOutput) else output if isinstance(output, tuple) else ()
    return (value for value in values if isinstance(value, Cache))


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
