"""How much runs at once: memory does not grow with the number of prompts, and a large vocabulary does not fill it.

Budgets are in bytes, tokens and logits, not rows: rows of a vocabulary of 262,144 cost five times those of 49,152.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from bridges.tasks.pairs import TaskPairs

STREAM_BYTES = 128_000_000
"""Streams and reads that one batch of prompts may hold."""
KEPT_BYTES = 300_000_000
"""Streams and reads of a whole task, or of a text, that are kept from one use to the next; larger ones run again."""
MAX_TOKENS = 2048
"""Tokens that run at once."""
MAX_LOGITS = 2**24
"""Logits that one call of the head gives: 64 MiB in float32."""


class PairBatch(NamedTuple):
    """Some pairs of a task, without the padding that all of them begin with."""

    rows: Int[Tensor, " b"]
    """Their indices in the task."""
    pairs: TaskPairs


def pair_batches(
    pairs: TaskPairs,
    bytes_per_token: int,
    vocab_size: int,
    shared: Int[Tensor, " n"] | None = None,
    bytes_per_shared_token: int = 0,
) -> list[PairBatch]:
    """Split pairs into batches that keep within the budgets, pairs of like length together, one at least in each.

    `shared`: how many tokens of each row, padding too, run once for all passes; rows that are alike after them come
    together.
    """
    width = pairs.input_ids.shape[1]
    lengths = width - pairs.attention_mask.cpu().argmax(1)
    kept = lengths if shared is None else torch.minimum(width - shared.cpu(), lengths)
    max_rows = MAX_LOGITS // vocab_size
    groups: list[list[int]] = []
    longest = 0
    for row in (kept * (width + 1) + lengths).argsort(stable=True).tolist():
        n = len(groups[-1]) + 1 if groups else 0
        last = int(kept[row])
        longest = max(longest, int(lengths[row]))
        n_bytes = n * (last * bytes_per_token + (longest - last) * bytes_per_shared_token)
        if groups and n <= max_rows and n * longest <= MAX_TOKENS and n_bytes <= STREAM_BYTES:
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = int(lengths[row])
    return [_batch(pairs, torch.tensor(group), lengths) for group in groups]


def _batch(pairs: TaskPairs, rows: Int[Tensor, " b"], lengths: Int[Tensor, " n"]) -> PairBatch:
    first_token = pairs.input_ids.shape[1] - int(lengths[rows].max())
    return PairBatch(rows, pairs.take(rows, first_token))


def row_batches(rows: Int[Tensor, "n seq"]) -> list[Int[Tensor, "b seq"]]:
    """Split rows of text into batches of at most `MAX_TOKENS` tokens, one row at least in each."""
    return list(rows.split(max(1, MAX_TOKENS // rows.shape[1])))


def token_chunks(n_rows: int, n_tokens: int, vocab_size: int) -> Iterator[Int[Tensor, " kept"]]:
    """The indices of a row's tokens in chunks whose logits, over all rows, are at most `MAX_LOGITS`."""
    size = max(1, MAX_LOGITS // (n_rows * vocab_size))
    yield from torch.arange(n_tokens).split(size)
