"""Sets of tokens, one per row, in which rows with the same set share it.

A task's answer may be "any word": 94,000 tokens of a vocabulary of 262,144. Stored row by row, the answers of 264
pairs would take 200 MB; there are two different ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

FEW_TOKENS = 16
"""Sets of up to so many tokens are summed row by row, larger ones set by set."""


class TokenSets(NamedTuple):
    """The different sets, and which one each row has.

    >>> sets = TokenSets.of_rows(torch.tensor([[3, 4], [5, -1], [3, 4]]))
    >>> sets.distinct, sets.index
    (tensor([[ 3,  4],
            [ 5, -1]]), tensor([0, 1, 0]))
    """

    distinct: Int[Tensor, "sets tokens"]
    """Each different set once; those with fewer tokens are filled with -1."""
    index: Int[Tensor, " n"]
    """Per row, the index of its set."""

    @classmethod
    def of_rows(cls, rows: Int[Tensor, "n tokens"]) -> TokenSets:
        """From one row of tokens each, filled with -1."""
        return cls(*_first_seen(*torch.unique(rows, dim=0, return_inverse=True)))

    @classmethod
    def of_tuples(cls, rows: Sequence[tuple[int, ...]]) -> TokenSets:
        """From a tuple of tokens for each row."""
        number = {tokens: i for i, tokens in enumerate(dict.fromkeys(rows))}
        distinct = torch.full((len(number), max(map(len, number))), -1)
        for row, tokens in zip(distinct, number, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return cls(distinct, torch.tensor([number[tokens] for tokens in rows]))

    def filled(self) -> Int[Tensor, "n tokens"]:
        """One row of tokens each, filled with -1."""
        return self.distinct[self.index]

    def take(self, rows: Int[Tensor, " rows"]) -> TokenSets:
        """The sets of the rows with these indices."""
        return TokenSets(self.distinct, self.index[rows.to(self.index.device)])

    def to(self, device: torch.device | str) -> TokenSets:
        """The sets on another device."""
        return TokenSets(self.distinct.to(device), self.index.to(device))

    def sums(self, values: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
        """The sum of each row's values over its set of tokens."""
        distinct, index = self.distinct.to(values.device), self.index.to(values.device)
        if distinct.shape[1] <= FEW_TOKENS:
            tokens = distinct[index]
            return torch.where(tokens >= 0, values.gather(1, tokens.clamp(min=0)), 0).sum(1)
        total = values.new_zeros(len(values))
        for i in index.unique():
            tokens, rows = distinct[i][distinct[i] >= 0], index == i
            total[rows] = values[rows][:, tokens].sum(1)
        return total

    def logsumexp(self, values: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
        """The logarithm of the sum of exponentials of each row's values over its set of tokens."""
        distinct, index = self.distinct.to(values.device), self.index.to(values.device)
        if distinct.shape[1] <= FEW_TOKENS:
            tokens = distinct[index]
            return values.gather(1, tokens.clamp(min=0)).masked_fill(tokens < 0, -torch.inf).logsumexp(1)
        found = values.new_empty(len(values))
        for i in index.unique():
            tokens, rows = distinct[i][distinct[i] >= 0], index == i
            found = found.masked_scatter(rows, values[rows][:, tokens].logsumexp(1))
        return found


def _first_seen(
    distinct: Int[Tensor, "sets tokens"], index: Int[Tensor, " n"]
) -> tuple[Int[Tensor, "sets tokens"], Int[Tensor, " n"]]:
    """The sets in the order of the rows that they stand in first."""
    order = list(dict.fromkeys(index.tolist()))
    position = torch.empty(len(order), dtype=torch.long, device=index.device)
    position[torch.tensor(order, dtype=torch.long, device=index.device)] = torch.arange(len(order), device=index.device)
    return distinct[order], position[index]
