"""A second model run on the same tokens as the dense model, with its own cache, which follows the dense model's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from bridges.models.huggingface.recording import model_inputs
from bridges.steering.model_call import (
    CacheRecords,
    ModelCall,
    check_counts_tokens,
    check_keeps_tokens,
    not_followed,
    returned_caches,
)

_OF_THE_RUN = frozenset({"past_key_values", "use_cache", "labels"})
"""Arguments that a second run of the same call has otherwise, or does not need."""

_KNOWN = frozenset(
    {"input_ids", "attention_mask", "position_ids", "cache_position", "labels", "shift_labels", "logits_to_keep"}
    | {"num_items_in_batch"}
)
"""Tensors that change nothing of what another model reads, or are given to it, too."""


class Companion:
    """A second model run on the same tokens as the dense model: on each token once.

    Its cache layers are appended to the dense model's cache, so that whatever happens to that (beams reordered, rows
    repeated or dropped, tokens taken back) happens to both. `detach_caches` removes them.
    """

    def __init__(self, model: nn.Module, same_call: bool = False):
        """`same_call`: the model is the dense one, and is called with the same arguments."""
        self.model, self.same_call = model, same_call
        self._caches: CacheRecords[Cache] = CacheRecords()
        """The companion's own cache, by the dense model's."""

    @torch.no_grad()
    def run(self, call: ModelCall) -> Cache | None:
        """Run on the call's new tokens; returns the companion's own cache, None for a call without a cache.

        After the call, `attach_cache` lets it follow the dense model's. Raises ValueError if that holds tokens that the
        companion did not see, and if the companion's own does not count its tokens.
        """
        inputs = self._inputs(call)
        if not call.uses_cache:
            self.model(**inputs, use_cache=False)
            return None
        check_keeps_tokens(self.model)
        own = None if call.n_past == 0 else self._cache_of(call)
        output = self.model(**inputs, use_cache=True, past_key_values=own)
        own = next(returned_caches(output), None) if own is None else own
        if own is None and call.cache is not None:
            raise not_followed(self.model, "returns no cache")
        if own is not None:
            check_counts_tokens(self.model, own, call.n_past + call.input_ids.shape[1])
        return own

    def _inputs(self, call: ModelCall) -> dict[str, Any]:
        if self.same_call:
            return {name: value for name, value in call.arguments.items() if name not in _OF_THE_RUN}
        for name, value in call.arguments.items():
            if name not in _KNOWN and isinstance(value, Tensor) and value.any():
                raise ValueError(
                    f"{name}: the model given as sparse= reads tokens alone, and would not see it; leave it out, or "
                    "use source='encoder'"
                )
        inputs = model_inputs(self.model, call.input_ids, call.attention_mask)
        return {name: value for name, value in inputs.items() if name != "use_cache"}

    def attach_cache(self, cache: Cache, own: Cache) -> None:
        """Let the companion's own cache follow a cache of the dense model, whose layers must exist already."""
        before = self._caches.get(cache)
        if before is own:
            return
        if before is not None:
            _remove_layers(cache, before)
        cache.layers.extend(own.layers)
        self._caches.set(cache, own)

    def detach_caches(self) -> None:
        """Remove the companion's layers from every cache that they were appended to, and from deep copies of it."""
        for cache, own in self._caches.items():
            _remove_layers(cache, own)
        self._caches.clear()

    def _cache_of(self, call: ModelCall) -> Cache:
        own = self._caches.get(call.cache)
        if own is None or own.get_seq_length() != call.n_past:
            raise ValueError(
                f"past_key_values holds {call.n_past} tokens that were not read inside this steer(); start the prompt "
                "inside it, or use source='encoder' with edits at one site"
            )
        return own


def _remove_layers(cache: Cache, own: Cache) -> None:
    gone = {id(layer) for layer in own.layers}
    cache.layers[:] = [layer for layer in cache.layers if id(layer) not in gone]


_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def model_lock(model: Any) -> AbstractContextManager[Any]:
    """A lock held while a module is decomposed or read, as threads that steer two dense models may share a sparse one.

    A model that is named by a folder or hub id is loaded anew each time, so it needs none.
    """
    return _LOCKS.setdefault(model, RLock()) if isinstance(model, nn.Module) else nullcontext()
