"""Rows of tokens in memory, in an order that depends on a seed and a step number alone."""

from __future__ import annotations

import hashlib
from functools import cached_property, lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from bridges.models.tokens import Batch


class Rows:
    """Tokens [n, seq] and their mask; `take` reshuffles them by seed whenever all have been taken.

    The rows of a step depend on the seed and the step alone, so a resumed run needs no cursor, and any number of
    processes sees the same rows.
    """

    def __init__(
        self, input_ids: Int[Tensor, "n seq"], attention_mask: Int[Tensor, "n seq"] | None = None, seed: int = 0
    ):
        if input_ids.ndim != 2 or not len(input_ids):
            raise ValueError(f"data of shape {list(input_ids.shape)} must be [n, seq] with at least one row")
        whole = attention_mask is None or bool(attention_mask.all())
        self.input_ids, self.seed = input_ids.cpu().long(), seed
        self.attention_mask = None if whole else attention_mask.cpu().long()  # pyright: ignore
        """None where no token is padding."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def seq_len(self) -> int:
        """Tokens per row, padding included."""
        return self.input_ids.shape[1]

    @cached_property
    def real_tokens(self) -> Int[Tensor, " n"]:
        """How many tokens of each row are not padding."""
        if self.attention_mask is None:
            return torch.full((len(self),), self.seq_len)
        return self.attention_mask.sum(1)

    def rows_holding(self, n_tokens: int, shuffled: bool = False) -> int:
        """How many of the first rows hold `n_tokens` tokens that are not padding: at least one row, at most all.

        `shuffled`: of those that `take` gives first.
        """
        real = self.real_tokens[_order(len(self), self.seed, 0)] if shuffled else self.real_tokens
        return min(len(self), int(torch.searchsorted(real.cumsum(0), n_tokens)) + 1)

    def take(self, start: int, count: int) -> Batch:
        """Rows `start` to `start + count` of the endless sequence of shuffled epochs."""
        parts, stop = [], start + count
        while start < stop:
            epoch, first = divmod(start, len(self))
            parts.append(_order(len(self), self.seed, epoch)[first : first + stop - start])
            start += len(parts[-1])
        index = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
        return self.input_ids[index], None if self.attention_mask is None else self.attention_mask[index]

    def batch(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop`, not shuffled."""
        mask = self.attention_mask
        return self.input_ids[start:stop], None if mask is None else mask[start:stop]

    def in_order(self, batch_size: int) -> list[Batch]:
        """All rows in batches, not shuffled."""
        return [self.batch(i, i + batch_size) for i in range(0, len(self), batch_size)]

    def first(self, count: int) -> Rows:
        """The first `count` rows."""
        return Rows(*self.batch(0, count), self.seed)

    def split(self, heldout_rows: int) -> tuple[Rows, Rows]:
        """All but the last rows, and the last rows."""
        cut = len(self) - heldout_rows
        return self.first(cut), Rows(*self.batch(cut, len(self)), self.seed)

    def fingerprint(self) -> str:
        """A hash of the tokens and the mask."""
        digest = hashlib.blake2b(str(self.input_ids.shape).encode(), digest_size=16)
        for tensor in (self.input_ids, self.attention_mask):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


@lru_cache(maxsize=4)
def _order(n_rows: int, seed: int, epoch: int) -> Tensor:
    """A permutation of the rows; kept for a few epochs, since a step asks for every row by itself."""
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
