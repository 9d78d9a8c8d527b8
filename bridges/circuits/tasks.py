"""Binary next-token tasks on pairs of prompts that differ in one cue (paper table 1; method, section 7)."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from bridges.data.idioms import phrase
from bridges.data.words import NAMES, VERBS


class TaskPairs(NamedTuple):
    """Prompts and their counterfactuals; what answers one is what the other asks for."""

    task: str
    input_ids: Int[Tensor, "n seq"]
    """Presented prompts, padded on the left."""
    counterfactual_ids: Int[Tensor, "n seq"]
    """The same with the cue changed."""
    attention_mask: Int[Tensor, "n seq"]
    answers: Int[Tensor, " n"]
    """The first token of the presented prompt's answer."""
    targets: Int[Tensor, " n"]
    """The first token of the counterfactual prompt's answer."""


QUOTES = {"'": "')", '"': '")'}


def single_double_quote(tokenizer: Any, n: int, seed: int = 0, max_tokens: int = 32) -> TaskPairs:
    """`n` pairs: a string opened by `('` or `("`, to be closed alike; half are presented with either quote.

    ValueError if the tokenizer does not open and close such a string with one token each.
    """
    answers = {quote: _single_token(tokenizer, close) for quote, close in QUOTES.items()}
    rng, pairs = random.Random(f"single_double_quote {seed}"), []
    for i in range(n):
        shown, other = ("'", '"') if i % 2 == 0 else ('"', "'")
        ids, swapped = _differing_once(tokenizer, rng, shown, other, max_tokens)
        pairs.append((ids, swapped, answers[shown], answers[other]))
    return _stack("single_double_quote", pairs)


def _differing_once(
    tokenizer: Any, rng: random.Random, shown: str, other: str, max_tokens: int
) -> tuple[list[int], list[int]]:
    """A prompt with either quote, of equal length, whose tokens differ at the opening alone."""
    for _ in range(1000):
        opening, text = _opening(rng), phrase(rng)
        ids, swapped = (_encode(tokenizer, f"{opening}({quote}{text}") for quote in (shown, other))
        if len(ids) == len(swapped) <= max_tokens and sum(a != b for a, b in zip(ids, swapped, strict=True)) == 1:
            return ids, swapped
    raise ValueError(f"tokenizer opens no string of up to {max_tokens} tokens with (' or (\" as one token")


def _opening(rng: random.Random) -> str:
    """What stands before the bracket of a call."""
    verb, name = rng.choice(VERBS), rng.choice(NAMES)
    return rng.choice(("print", verb, f"{name} = {verb}", f"return {verb}"))


def _encode(tokenizer: Any, text: str) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]


def _single_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"tokenizer splits {text!r} into {len(ids)} tokens; this task needs it to be one")
    return ids[0]


def _stack(task: str, pairs: list[tuple[list[int], list[int], int, int]]) -> TaskPairs:
    width = max(len(ids) for ids, *_ in pairs)
    ids, swapped, mask = (torch.zeros(len(pairs), width, dtype=torch.long) for _ in range(3))
    for row, (shown, other, *_) in enumerate(pairs):
        ids[row, -len(shown) :] = torch.tensor(shown)
        swapped[row, -len(shown) :] = torch.tensor(other)
        mask[row, -len(shown) :] = 1
    answers, targets = (torch.tensor([pair[i] for pair in pairs]) for i in (2, 3))
    return TaskPairs(task, ids, swapped, mask, answers, targets)
