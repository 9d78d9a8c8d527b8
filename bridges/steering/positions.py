"""Token positions of a forward call, and which of the tokens belong to a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from bridges.models.attention_mask import position_ids
from bridges.steering.model_call import CacheRecords, ModelCall


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as it was given, padding included."""

    input_ids: Int[Tensor, "b width"]
    attention_mask: Int[Tensor, "b end"]
    """Over the tokens before the prompt, if any, and its own."""

    @property
    def start(self) -> int:
        """Column of its first token; 0 unless `generate` was given the new tokens of a longer row alone."""
        return self.end - self.input_ids.shape[1]

    @property
    def end(self) -> int:
        """Column after its last token."""
        return self.attention_mask.shape[1]

    def for_rows(self, rows: int) -> Prompt:
        """The prompt with each row repeated, as `generate` does for beams; `rows` is a multiple of its own."""
        times = rows // len(self.input_ids)
        return Prompt(*(tensor.repeat_interleave(times, 0) for tensor in (self.input_ids, self.attention_mask)))


@dataclass(frozen=True, eq=False)
class TokenSpan:
    """The new tokens of one call."""

    attention_mask: Int[Tensor, "b t"]
    """Over the tokens before the call and its own."""
    start: int
    """Column of the first new token, padding included."""
    prompt: Prompt | None
    """The prompt that the call reads, or a piece of which it reads; None after the prompt."""

    @cached_property
    def real(self) -> Bool[Tensor, "b s"]:
        """True at the new tokens that are not padding."""
        return self.attention_mask[:, self.start :].bool()

    @cached_property
    def positions(self) -> Int[Tensor, "b s"]:
        """Each new token's index among its row's real ones."""
        return position_ids(self.attention_mask)[:, self.start :]

    @cached_property
    def prompt_lengths(self) -> Int[Tensor, "b 1"] | None:
        """Real tokens of each row up to the prompt's end; None after the prompt."""
        if self.prompt is None:
            return None
        mask, end = self.attention_mask, self.prompt.end
        given = self.prompt.for_rows(len(mask)).attention_mask.to(mask.device)
        # What the call has of the mask counts: `generate` may have inferred it from the padding token.
        return torch.cat([mask[:, :end], given[:, mask.shape[1] :]], 1).sum(1, keepdim=True)

    def mask_at(self, positions: Sequence[int]) -> Bool[Tensor, "b s"]:
        """True at the tokens that an edit's positions name."""
        named = torch.zeros_like(self.real)
        for position in positions:
            if position >= 0:
                named |= self.positions == position
            elif self.prompt_lengths is not None:
                named |= self.positions == self.prompt_lengths + position
        return named & self.real

    def prompt_values(self, value: Float[Tensor, "rows prompt"]) -> Float[Tensor, "b s"]:
        """The part of a value per prompt token that falls on the new tokens; zero after the prompt.

        Raises ValueError if `value` does not fit the prompts.
        """
        rows, width = self.real.shape
        if rows % len(value):
            raise ValueError(f"value={tuple(value.shape)} is for {len(value)} rows, the model was given {rows}")
        first, end = (0, 0) if self.prompt is None else (self.prompt.start, self.prompt.end)
        if first == self.start < end:
            self._check_width(value, end - first)
        # A cache may hold tokens before the prompt, and new tokens may follow it.
        values = F.pad(value.to(self.real.device), (first, 0))[:, self.start : min(self.start + width, end)]
        values = F.pad(values, (0, width - values.shape[1]))
        return values.repeat_interleave(rows // len(value), dim=0)  # as generate repeats prompts for beams

    def _check_width(self, value: Tensor, prompt_width: int) -> None:
        shape = (len(self.real), prompt_width)
        if prompt_width < value.shape[1]:
            raise ValueError(f"value={tuple(value.shape)} is longer than the prompts, {shape}")
        if prompt_width > value.shape[1] and not self.real[:, 0].all():
            raise ValueError(
                f"value={tuple(value.shape)} is shorter than the prompts, {shape}, which are padded on the left; make "
                "it from the padded prompts"
            )


class PromptTracker:
    """Finds what the prompt of each call is: a forward call does not say it.

    The prompt is what `generate` is given, in whatever pieces it is read; what its first call reads, if it is given no
    tokens. Outside `generate` it is what the first call on a cache reads; a call without a cache is its own prompt.
    """

    def __init__(self, positions: tuple[int, ...] | None = None, per_token: bool = False):
        """`positions` of an edit, and values `per_token`, need a prompt whose beginning was read inside steer()."""
        self._positions, self._per_token = positions, per_token
        self._records: CacheRecords[Prompt] = CacheRecords()
        """The prompt that was last read into each cache."""
        self._generate_prompts: list[Prompt | None] = []
        """Of the `generate` that is running: its prompt, None until it is known; then that of its guidance, if any."""

    @contextmanager
    def generating(self, prompts: Sequence[Prompt | None]) -> Iterator[None]:
        """Inside, calls belong to a `generate` that was given these prompts: its own, then that of guidance if any.

        Its own is None where it was given no tokens, and starts from one that it chooses itself.
        """
        outer, self._generate_prompts = self._generate_prompts, list(prompts)
        try:
            yield
        finally:
            self._generate_prompts = outer

    @property
    def in_generate(self) -> bool:
        """Whether a `generate` runs."""
        return bool(self._generate_prompts)

    def locate(self, call: ModelCall) -> TokenSpan:
        """The positions of the call's tokens, and the prompt that they belong to.

        Raises ValueError if an edit needs a prompt whose beginning was not read inside this steer(). Such a cache may
        also hold tokens that are no row's own: the virtual ones of prefix tuning.
        """
        ids, mask = call.input_ids, call.attention_mask
        mask = ids.new_ones(len(ids), call.n_past + ids.shape[1]) if mask is None else mask.to(ids.device).long()
        seen = call.n_past == 0 or self._records.get(call.cache) is not None
        if self._positions is not None and not seen:
            counted = "from the prompt's end" if min(self._positions, default=0) < 0 else "a row's tokens"
            raise ValueError(f"positions={self._positions} count {counted}, but {_unseen(call)}")
        if self._generate_prompts[:1] == [None] and call.n_past == 0:
            self._generate_prompts[0] = Prompt(ids, mask)
        read = [one for one in self._generate_prompts if one is not None and self._reads(call, one)]
        # Without a cache one prompt may begin with the other: the longest is the one that the call continues.
        prompt = max(read, key=lambda one: one.input_ids.shape[1], default=None)
        if prompt is None and call.n_past == 0:
            prompt = Prompt(ids, mask)
        if self._per_token and prompt is None and not seen:
            raise ValueError(f"value has a number per prompt token, but {_unseen(call)}")
        return TokenSpan(mask, call.n_past, prompt)

    def record(self, cache: Cache, span: TokenSpan) -> None:
        """Remember the prompt that a call has read into a cache."""
        if span.prompt is not None:
            self._records.set(cache, span.prompt)

    def clear(self) -> None:
        """Forget every cache."""
        self._records.clear()

    def _reads(self, call: ModelCall, prompt: Prompt) -> bool:
        """Whether a call inside `generate` reads one of its prompts, or a piece of it."""
        ids, start = call.input_ids, call.n_past - prompt.start
        rows, width = prompt.input_ids.shape
        if not 0 <= start < width or len(ids) % rows or not self._may_read(call, prompt):
            return False
        given = prompt.for_rows(len(ids)).input_ids.to(ids.device)[:, start : start + ids.shape[1]]
        return torch.equal(ids[:, : given.shape[1]], given)

    def _may_read(self, call: ModelCall, prompt: Prompt) -> bool:
        if call.cache is None:
            # A cache begins with the prompt alone; without one every call reads the prompt and what followed it.
            n_following = call.input_ids.shape[1] - prompt.input_ids.shape[1]
            return n_following == 0 if call.uses_cache else n_following >= 0
        # The first cache that reads the prompt goes on with it. Guidance has a cache of its own, whose first call is
        # its prompt; one token of that may equal the prompt's first by chance.
        readers = [cache for cache, known in self._records.items() if known is prompt]
        return prompt is self._generate_prompts[0] and all(cache is call.cache for cache in readers)


def _unseen(call: ModelCall) -> str:
    return (
        f"past_key_values holds {call.n_past} tokens that were not read inside this steer(); start the prompt inside it"
    )
