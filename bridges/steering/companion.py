"""A model run beside another one on the same tokens, with a cache of its own that follows the other's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from bridges.models.huggingface.decompose import model_inputs
from bridges.models.residual import input_device


@dataclass(frozen=True)
class Pass:
    """One forward call of the leading model, as far as those beside it need to know."""

    input_ids: Int[Tensor, "b s"]
    attention_mask: Int[Tensor, "b t"] | None
    """Over the cached tokens and the new ones, None where none is padding."""
    cache: Cache | None
    """The leading model's, None without one (or before the model has made it)."""
    cached: bool
    """Whether the leading model keeps a cache from this call on."""
    past: int
    """Tokens in the cache before this call."""
    picked: bool = False
    """Whether logits of tokens picked by index are asked for."""


_MARKS = count()
"""Numbers that tell shadows apart for good: an id may be given again, a copied cache keeps its number."""


class Shadow:
    """A model that sees every token that the leading model sees, once.

    Its cache layers are appended to the leading model's cache, so that whatever happens to that (beams reordered, rows
    repeated or dropped, tokens taken back) happens to both.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._latest: Cache | None = None
        self._mark = next(_MARKS)

    @torch.no_grad()
    def run(self, call: Pass) -> None:
        """Run on the call's new tokens; ValueError where the leading cache holds tokens that were not seen here."""
        inputs = model_inputs(self.model, call.input_ids, call.attention_mask)
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"][:, call.past :]
        if not call.cached:
            self.model(**inputs)
            return
        own = self._start() if call.past == 0 else self._continued(call)
        self.model(**{**inputs, "use_cache": True, "past_key_values": own})
        self._latest = own
        if call.past == 0 and call.cache is not None and call.cache.layers:
            self.join(call.cache)  # one without layers yet is joined after the call, when the model has made its own

    def join(self, leading: Cache) -> None:
        """From now on the latest cache follows the leading one."""
        own, joined = self._latest, vars(leading).setdefault("_shadows", {})
        if own is not None and joined.get(self._mark) is not own:
            leading.layers.extend(own.layers)
            joined[self._mark] = own

    def _start(self) -> Cache:
        return DynamicCache(config=self.model.config)  # pyright: ignore[reportArgumentType]

    def _continued(self, call: Pass) -> Cache:
        own = vars(call.cache).get("_shadows", {}).get(self._mark) if call.cache is not None else None
        if own is None or own.get_seq_length() != call.past:
            raise ValueError(
                f"past_key_values holds {call.past} tokens that were not read inside this steer(); start the prompt "
                "inside it, or use source='encoder' with edits at one site"
            )
        return own


@cache  # asked at every token
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a method's parameters, without its self."""
    return tuple(inspect.signature(forward).parameters)[1:]


def leading_pass(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Pass:
    """What a call of a Hugging Face model says; ValueError where it gives embeddings in place of tokens."""
    given = {**dict(zip(_parameters(type(model).forward), args, strict=False)), **kwargs}
    input_ids, cache, mask = (given.get(name) for name in ("input_ids", "past_key_values", "attention_mask"))
    if input_ids is None:
        raise ValueError("inputs_embeds: steer needs input_ids, to know the tokens that an edit is read from or put at")
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            "past_key_values: a static cache has one length, so readings cannot follow it; use the default (dynamic) "
            "cache, or edits that add one number everywhere"
        )
    past = 0 if cache is None else int(cache.get_seq_length())
    use_cache = given.get("use_cache")
    use_cache = getattr(model.config, "use_cache", False) if use_cache is None else use_cache  # pyright: ignore
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"attention_mask {tuple(mask.shape)} must be [batch, seq]: steer counts real tokens by it")
    if mask is not None and mask.shape[1] != past + input_ids.shape[1]:
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} must cover {past} cached and {input_ids.shape[1]} new tokens"
        )
    picked = isinstance(given.get("logits_to_keep"), Tensor)
    return Pass(input_ids.to(input_device(model)), mask, cache, cache is not None or bool(use_cache), past, picked)
