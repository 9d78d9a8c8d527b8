"""Rows: tokens in memory, given out in an order that a step number alone decides."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor


class Rows:
    """[n, seq] tokens and their mask, reshuffled by seed whenever exhausted.

    The rows of a step depend on the seed and the step alone, so a resumed run needs no cursor beside its step, and any
    number of processes sees the same rows.
    """

    def __init__(
        self, input_ids: Int[Tensor, "n seq"], attention_mask: Int[Tensor, "n seq"] | None = None, seed: int = 0
    ):
        if input_ids.ndim != 2 or not len(input_ids):
            raise ValueError(f"data of shape {list(input_ids.shape)} is not [n, seq] with at least one row")
        whole = attention_mask is None or bool(attention_mask.all())
        self.input_ids, self.seed = input_ids.cpu().long(), seed
        self.attention_mask = None if whole else attention_mask.cpu().long()  # pyright: ignore
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def seq_len(self) -> int:
        """Tokens per row, padding included."""
        return self.input_ids.shape[1]

    def take(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Rows `start` to `start + count` of the endless shuffled sequence."""
        places = range(start, start + count)
        index = torch.tensor([int(self._order(place // len(self))[place % len(self)]) for place in places])
        return self.input_ids[index], None if self.attention_mask is None else self.attention_mask[index]

    def in_order(self, batch_size: int, limit: int | None = None) -> list[tuple[Tensor, Tensor | None]]:
        """The first `limit` rows as they stand, in batches."""
        stop = len(self) if limit is None else min(limit, len(self))
        slices = [slice(i, min(i + batch_size, stop)) for i in range(0, stop, batch_size)]
        mask = self.attention_mask
        return [(self.input_ids[s], None if mask is None else mask[s]) for s in slices]

    def first(self, count: int) -> Rows:
        """The first `count` rows as they stand."""
        mask = self.attention_mask
        return Rows(self.input_ids[:count], None if mask is None else mask[:count], self.seed)

    def split(self, heldout_rows: int) -> tuple[Rows, Rows]:
        """All but the last rows, and the last rows."""
        cut, mask = len(self) - heldout_rows, self.attention_mask
        return self.first(cut), Rows(self.input_ids[cut:], None if mask is None else mask[cut:], self.seed)

    def fingerprint(self) -> str:
        """A hash of the tokens and the mask."""
        digest = hashlib.blake2b(str(self.input_ids.shape).encode(), digest_size=16)
        for tensor in (self.input_ids, self.attention_mask):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _shuffled(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self), generator=generator)
