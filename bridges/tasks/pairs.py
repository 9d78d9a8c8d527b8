"""Binary next-token tasks on pairs of prompts that differ in one cue (paper table 1; method, section 7)."""

from __future__ import annotations

import random
from collections import Counter
from functools import lru_cache
from numbers import Integral
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.tasks.templates import EXAMPLES, Answer, Example, with_fillers

TASKS = tuple(EXAMPLES)
"""The names of the twenty tasks."""
MAX_TOKENS = 96
"""Tokens that a prompt may have where nothing else is asked for."""
TRIES_PER_EXAMPLE = 200
PLAIN_TRIES_PER_EXAMPLE = 50
"""After so many, prompts get lines in front that carry no cue: some tokenizers give a pair no equal length without."""


class TaskPairs(NamedTuple):
    """Prompts and their counterfactuals; what answers one is what the other asks for."""

    task: str
    input_ids: Int[Tensor, "n seq"]
    """Presented prompts, padded on the left."""
    counterfactual_ids: Int[Tensor, "n seq"]
    """The same with the cue changed, of the same length row by row."""
    attention_mask: Int[Tensor, "n seq"]
    answers: Int[Tensor, "n tokens"]
    """The first tokens that answer the presented prompt, -1 where a row has fewer: most often one."""
    targets: Int[Tensor, "n tokens"]
    """The first tokens that answer the counterfactual prompt."""
    direction: Int[Tensor, " n"]
    """0 where the task's first prompt is presented, 1 where its second is."""

    def rows(self, start: int, stop: int | None = None) -> TaskPairs:
        """Some of the pairs."""
        task, *tensors = self
        return TaskPairs(task, *(tensor[start:stop] for tensor in tensors))

    def to(self, device: torch.device | str) -> TaskPairs:
        """The same on another device."""
        task, *tensors = self
        return TaskPairs(task, *(tensor.to(device) for tensor in tensors))


def task_pairs(task: str, tokenizer: Any, n: int, seed: int = 0, max_tokens: int = MAX_TOKENS) -> TaskPairs:
    """`n` pairs of a task, half presented from either side; the same seed gives the same pairs.

    No prompt stands in two pairs, so any rows of them share none with the others. Both prompts of a pair have one
    length in tokens. Where both answers begin with the same tokens, those are moved to the prompts, so the first token
    always tells the answers apart. ValueError for an unknown task, for n under 1, or when the tokenizer does not let
    `n` pairs be made: it names the rule that was broken most often.
    """
    if task not in EXAMPLES:
        raise ValueError(f"task={task!r} is unknown; tasks are {', '.join(TASKS)}")
    if not isinstance(n, Integral) or n < 1:
        raise ValueError(f"n={n!r} must be a whole number of pairs, at least 1")
    if not hasattr(tokenizer, "encode"):
        raise ValueError(f"tokenizer={tokenizer!r} cannot encode text; pass a Hugging Face tokenizer")
    rng, broken = random.Random(f"{task} {seed}"), Counter[str]()
    pairs: list[_Encoded] = []
    drawn: set[tuple[int, ...]] = set()
    for draw in range(TRIES_PER_EXAMPLE * n):
        example = EXAMPLES[task](rng)
        if draw >= PLAIN_TRIES_PER_EXAMPLE * n:
            example = with_fillers(example, rng)
        encoded = _encode(tokenizer, example, max_tokens)
        if isinstance(encoded, str):
            broken[encoded] += 1
        elif not drawn.isdisjoint(prompts := (tuple(encoded.first), tuple(encoded.second))):
            broken["one of their prompts was drawn before"] += 1
        else:
            pairs.append(encoded)
            drawn.update(prompts)
        if len(pairs) == n:
            return _stack(task, pairs)
    rule, times = broken.most_common(1)[0]
    raise ValueError(
        f"task={task!r}: only {len(pairs)} of n={n} pairs could be made with this tokenizer; {times} draws were "
        f"refused because {rule}"
    )


def probability(logits: Float[Tensor, "n vocab"], tokens: Int[Tensor, "n tokens"]) -> Float[Tensor, " n"]:
    """The full-vocabulary probability of each row's set of tokens; -1 fills a set and counts nothing."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    p = logits.to(wide).softmax(-1).gather(1, tokens.clamp(min=0).to(logits.device))
    return torch.where(tokens.to(logits.device) >= 0, p, 0).sum(1)


def solved(logits: Float[Tensor, "n vocab"], pairs: TaskPairs) -> Bool[Tensor, " n"]:
    """True where the presented prompt's answer is likelier than the counterfactual's."""
    return probability(logits, pairs.answers) > probability(logits, pairs.targets)


class _Encoded(NamedTuple):
    first: list[int]
    first_answer: tuple[int, ...]
    second: list[int]
    second_answer: tuple[int, ...]


def _encode(tokenizer: Any, example: Example, max_tokens: int) -> _Encoded | str:
    """The pair in tokens, or the rule that it breaks."""
    sides = []
    for prompt, answer in ((example.first, example.first_answer), (example.second, example.second_answer)):
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        following = _following(tokenizer, prompt, ids, answer)
        if not following:
            return f"the tokenizer joins {_shown(answer)} with the prompt's end, or has no token for it"
        sides.append((ids, following))
    (first, answer), (second, other) = sides
    while isinstance(answer, list) and isinstance(other, list) and answer and other and answer[0] == other[0]:
        first, second, answer, other = [*first, answer[0]], [*second, other[0]], answer[1:], other[1:]
    answers = [{side[0]} if isinstance(side, list) and side else set(side) for side in (answer, other)]
    if not answers[0] or not answers[1] or answers[0] & answers[1]:
        return f"{_shown(example.first_answer)} and {_shown(example.second_answer)} share their first token"
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if len(first) != len(second):
        return "its two prompts differ in length"
    if len(first) + len(bos) > max_tokens:
        return f"the prompts are over max_tokens={max_tokens}"
    return _Encoded(bos + first, tuple(sorted(answers[0])), bos + second, tuple(sorted(answers[1])))


def _following(tokenizer: Any, prompt: str, ids: list[int], answer: Answer) -> list[int] | set[int]:
    """The answer's tokens in order where it is text, the set of tokens that begin it where it is a pattern."""
    if not isinstance(answer, str):
        return set(_beginning(tokenizer, answer))
    whole = tokenizer.encode(prompt + answer, add_special_tokens=False)
    return whole[len(ids) :] if whole[: len(ids)] == ids else []


@lru_cache(maxsize=32)
def _beginning(tokenizer: Any, pattern: Any) -> tuple[int, ...]:
    texts = ((i, tokenizer.decode([i])) for i in range(len(tokenizer)))
    return tuple(i for i, text in texts if pattern.match(text))


def _shown(answer: Answer) -> str:
    return repr(answer if isinstance(answer, str) else answer.pattern)


def _stack(task: str, encoded: list[_Encoded]) -> TaskPairs:
    """Every other pair the other way round, padded on the left."""
    turned = [pair if i % 2 == 0 else _Encoded(*pair[2:], *pair[:2]) for i, pair in enumerate(encoded)]
    width = max(len(pair.first) for pair in turned)
    ids, swapped, mask = (torch.zeros(len(turned), width, dtype=torch.long) for _ in range(3))
    for row, pair in enumerate(turned):
        ids[row, -len(pair.first) :] = torch.tensor(pair.first)
        swapped[row, -len(pair.second) :] = torch.tensor(pair.second)
        mask[row, -len(pair.first) :] = 1
    answers, targets = _sets([pair.first_answer for pair in turned]), _sets([pair.second_answer for pair in turned])
    return TaskPairs(task, ids, swapped, mask, answers, targets, torch.arange(len(turned)) % 2)


def _sets(rows: list[tuple[int, ...]]) -> Tensor:
    filled = torch.full((len(rows), max(map(len, rows))), -1)
    for row, tokens in zip(filled, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return filled
