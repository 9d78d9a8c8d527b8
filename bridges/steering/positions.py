"""Where edits fall and how much they change there: positions, readings, the order of several edits of one channel."""

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

from bridges.bridge import BridgeSet
from bridges.models.residual import ResidualModel, position_ids
from bridges.steering.companion import Pass
from bridges.steering.edits import Edit


@dataclass(frozen=True)
class Window:
    """Where a call's new tokens stand in their rows."""

    mask: Int[Tensor, "b t"]
    """Over the tokens before the call and its own."""
    prompt: Int[Tensor, "b 1"] | None
    """Real tokens of the row's prompt, None where the prompt is over."""
    prompt_width: int
    """Columns of the prompt, 0 where it is over."""
    start: int
    """Column of the first new token, padding included."""

    @cached_property
    def real(self) -> Bool[Tensor, "b s"]:
        """True at the new tokens that are not padding."""
        return self.mask[:, self.start :].bool()

    @cached_property
    def place(self) -> Int[Tensor, "b s"]:
        """Each new token's index among its row's real ones."""
        return position_ids(self.mask)[:, self.start :]

    def at(self, positions: tuple[int, ...]) -> Bool[Tensor, "b s"]:
        """True at the tokens that an edit's positions name."""
        here = torch.zeros_like(self.real)
        for position in positions:
            if position >= 0:
                here |= self.place == position
            elif self.prompt is not None:
                here |= self.place == self.prompt + position
        return here & self.real

    def columns(self, value: Float[Tensor, "rows prompt"]) -> Float[Tensor, "b s"]:
        """A value per token of the prompt: the part that falls here, zero after the prompt."""
        rows, width = self.real.shape
        if rows % len(value):
            raise ValueError(f"value={tuple(value.shape)} is for {len(value)} rows, the model was given {rows}")
        prompts = (rows, self.prompt_width)
        if self.start == 0 and self.prompt_width < value.shape[1]:
            raise ValueError(f"value={tuple(value.shape)} is longer than the prompts, {prompts}")
        if self.start == 0 and self.prompt_width > value.shape[1] and not self.real[:, 0].all():
            raise ValueError(
                f"value={tuple(value.shape)} is shorter than the prompts, {prompts}, which are padded on the left; "
                "make it of the padded prompts"
            )
        here = value[:, self.start : min(self.start + width, self.prompt_width)].to(self.real.device)
        here = F.pad(here, (0, width - here.shape[1]))
        return here.repeat_interleave(rows // len(value), dim=0)  # as generate repeats prompts for beams


class Windows:
    """Where each call's new tokens stand; it remembers the last prompt, since a call does not say what that is.

    The prompt is what `generate` was given. Of other calls it is what the first of a cache is given; without a cache a
    call of one token more carries on from the last one, any other is a prompt of its own.
    """

    def __init__(self, edits: Sequence[Edit]):
        named = (edit.positions for edit in edits if edit.positions is not None)
        self._from_the_end = next((p for p in named if min(p, default=0) < 0), None)  # pyright: ignore
        self._prompt: Tensor | None = None
        self._width = 0
        self._told: tuple[Tensor, Tensor] | None = None
        """The prompt of the `generate` at hand, and its mask."""
        self._cache: Cache | None = None
        """The cache that it is read into."""
        self._started = False

    @contextmanager
    def generating(self, prompt: Int[Tensor, "b s"], mask: Tensor | None) -> Iterator[None]:
        """Inside, calls belong to a `generate` of this prompt, in whatever pieces it comes."""
        whole = torch.ones_like(prompt) if mask is None or mask.shape != prompt.shape else mask.long()
        outer = self._told, self._cache
        self._told, self._cache = (prompt, whole), None
        self._prompt, self._width = None, 0
        try:
            yield
        finally:
            self._told, self._cache = outer

    def of(self, call: Pass) -> Window:
        """ValueError where an edit counts from the end of a prompt that was not seen."""
        ids, mask = call.input_ids, call.attention_mask
        mask = ids.new_ones(len(ids), call.past + ids.shape[1]) if mask is None else mask.to(ids.device).long()
        self._started |= call.past == 0
        if not self._started and self._from_the_end is not None:
            raise ValueError(
                f"positions={self._from_the_end} count from the prompt's end, but past_key_values holds {call.past} "
                "tokens that were not read inside this steer(); start the prompt inside it"
            )
        if (told := self._told_prompt(call)) is not None:
            width = told.shape[1]
            told = torch.cat([mask[:, :width], told[:, mask.shape[1] :]], 1)  # the call knows what generate inferred
            return Window(mask, told.sum(1, keepdim=True), width, call.past)
        if call.past > 0:  # any cache may go on, not that of the last prompt alone
            return Window(mask, None, 0, call.past)
        width = self._own_prompt_width(call)
        return Window(mask, mask[:, :width].sum(1, keepdim=True), width, call.past)

    def _told_prompt(self, call: Pass) -> Int[Tensor, "b prompt"] | None:
        """The mask of the prompt that `generate` was given, where this call reads some of it; None elsewhere.

        Not every call inside is of that prompt: guidance, for one, reads another beside it.
        """
        ids, past = call.input_ids, call.past
        if self._told is None or past >= self._told[0].shape[1] or len(ids) % len(self._told[0]):
            return None
        if self._cache is not None and call.cache is not self._cache:
            return None
        times = len(ids) // len(self._told[0])
        prompt, mask = (tensor.to(ids.device).repeat_interleave(times, 0) for tensor in self._told)
        here = prompt[:, past : past + ids.shape[1]]
        if not torch.equal(ids[:, : here.shape[1]], here):
            return None
        self._cache = call.cache
        return mask

    def _own_prompt_width(self, call: Pass) -> int:
        ids, known, before = call.input_ids, self._prompt, self._width
        self._width = ids.shape[1]
        one_more = not call.cached and ids.shape[1] == before + 1
        if one_more and known is not None and torch.equal(ids[:, : known.shape[1]], known):
            return known.shape[1]
        self._prompt = ids.clone()
        return ids.shape[1]


@dataclass
class Place:
    """The edits at one bridged site and what they need there."""

    bridge: int
    dense_site: int
    sparse_site: int | None
    channels: list[int]
    edits: list[Edit]
    to_stream: Float[Tensor, "channels d_dense"]
    """What one read unit of each channel adds to the dense stream, strength included."""
    read_unit: Float[Tensor, " channels"]
    """gain_s / R_s: what one unit of each channel of the sparse stream is in a read."""
    reading: Float[Tensor, "b s channels"] | None = None

    @property
    def constant(self) -> bool:
        """Whether all edits add one number everywhere, so that the sum is one vector."""
        return all(edit.constant for edit in self.edits)

    @property
    def mode(self) -> str | None:
        """That of the first edit that needs the channel's reading, None where none does."""
        return next((edit.mode for edit in self.edits if edit.mode != "add"), None)

    def changes(self, window: Window) -> Float[Tensor, "b s channels"]:
        """dn of every channel: what the edits, one after another, make of its reading, less the reading."""
        shape = (*window.real.shape, len(self.channels))
        before = self.to_stream.new_zeros(shape) if self.reading is None else self.reading.to(self.to_stream)
        after = list(before.unbind(-1))
        for edit in self.edits:
            i = self.channels.index(edit.channel)
            after[i] = _applied(edit, after[i], window)
        return torch.stack(after, -1) - before

    def total(self) -> Float[Tensor, " channels"]:
        """dn of every channel where all edits are constant."""
        sums = [sum(float(e.value) for e in self.edits if e.channel == channel) for channel in self.channels]
        return self.to_stream.new_tensor(sums)


def _applied(edit: Edit, v: Tensor, window: Window) -> Tensor:
    if isinstance(edit.value, Tensor):
        return v + window.columns(edit.value).to(v)
    changed = edit.value if edit.mode == "set" else v + edit.value if edit.mode == "add" else v * edit.value
    here = window.real if edit.positions is None else window.at(edit.positions)  # pyright: ignore[reportArgumentType]
    return torch.where(here.to(v.device), changed, v)


def place_of(
    dense: ResidualModel,
    sparse: ResidualModel | None,
    bridge_set: BridgeSet,
    site: str,
    edits: list[Edit],
    strength: float,
) -> Place:
    """The edits of one sparse site, with what a read unit of each channel means to the dense stream."""
    i = bridge_set.index(site)
    channels = list(dict.fromkeys(edit.channel for edit in edits))
    bridge, (dense_site, sparse_site) = bridge_set[i], bridge_set.site_pairs[i]
    return Place(
        i,
        dense.index(dense_site),
        None if sparse is None else sparse.index(sparse_site),
        channels,
        edits,
        strength * bridge.read_columns(channels),
        bridge.gain_sparse[channels] / bridge.rms_sparse.to(bridge.gain_sparse),
    )
