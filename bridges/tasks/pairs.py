"""Binary next-token tasks on pairs of prompts that differ in one cue (paper table 1; method, section 7).

A cue is the token or tokens in which the prompts of a pair differ, and which decide the answer.

>>> len(TASKS), TASKS[:2]
(20, ('single_double_quote', 'final_kwarg'))
"""

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
from bridges.tasks.token_sets import TokenSets

TASKS = tuple(EXAMPLES)
"""The names of the twenty tasks."""
MAX_TOKENS = 96
"""Tokens that a prompt may have by default."""
MAX_DRAWS_PER_PAIR = 200
PLAIN_DRAWS_PER_PAIR = 50
"""After so many draws, prompts get lines without a cue in front: with some tokenizers no pair has equal lengths
otherwise."""


class TaskPairs:
    """Prompts of a task with their counterfactuals; the answer to one is the target of the other.

    Answers and targets are given as token ids [n, tokens], where rows with fewer are filled with -1, or as `TokenSets`.

    >>> ids, other, mask = torch.tensor([[[5, 6]], [[5, 7]], [[1, 1]]])
    >>> pairs = TaskPairs("mine", ids, other, mask, torch.tensor([[3, 4]]), torch.tensor([[8, -1]]), torch.tensor([0]))
    >>> pairs.answers
    tensor([[3, 4]])
    """

    def __init__(
        self,
        task: str,
        input_ids: Int[Tensor, "n seq"],
        counterfactual_ids: Int[Tensor, "n seq"],
        attention_mask: Int[Tensor, "n seq"],
        answers: Int[Tensor, "n tokens"] | TokenSets,
        targets: Int[Tensor, "n other_tokens"] | TokenSets,
        direction: Int[Tensor, " n"],
    ):
        self.task = task
        self.input_ids = input_ids
        """Original prompts, left-padded: ValueError for padding elsewhere."""
        self.counterfactual_ids = counterfactual_ids
        """The same prompts with the other cue, row by row of the same length."""
        self.attention_mask = attention_mask
        self.answer_sets, self.target_sets = (
            one if isinstance(one, TokenSets) else TokenSets.of_rows(one) for one in (answers, targets)
        )
        """Tokens that answer the original prompt, and tokens that answer the counterfactual prompt."""
        self.direction = direction
        """The task order: 0 where the original prompt is the task's first, 1 where it is the second."""
        self._check_shapes()

    def _check_shapes(self) -> None:
        shape = self.input_ids.shape
        for name, tensor in (("counterfactual_ids", self.counterfactual_ids), ("attention_mask", self.attention_mask)):
            if tensor.shape != shape:
                raise ValueError(f"{name} {tuple(tensor.shape)} must have the shape of input_ids, {tuple(shape)}")
        real = self.attention_mask.bool()
        wrong = ~real[:, -1] | (real[:, :-1] & ~real[:, 1:]).any(1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"attention_mask={self.attention_mask[row].tolist()} in row {row} must have its zeros on the left: the "
                "answer is read after the last token; set tokenizer.padding_side='left'"
            )
        rows = {"answers": self.answer_sets.index, "targets": self.target_sets.index, "direction": self.direction}
        for name, tensor in rows.items():
            if len(tensor) != shape[0]:
                raise ValueError(f"{name} has {len(tensor)} rows; it must have one for each of the {shape[0]} prompts")

    @property
    def answers(self) -> Int[Tensor, "n tokens"]:
        """Tokens that answer the original prompt, usually one; rows with fewer are filled with -1."""
        return self.answer_sets.filled()

    @property
    def targets(self) -> Int[Tensor, "n tokens"]:
        """Tokens that answer the counterfactual prompt, filled with -1."""
        return self.target_sets.filled()

    def rows(self, start: int, stop: int | None = None) -> TaskPairs:
        """The pairs from `start` up to `stop`."""
        return self.take(torch.arange(len(self.input_ids))[start:stop])

    def take(self, rows: Int[Tensor, " rows"], first_token: int = 0) -> TaskPairs:
        """The pairs with these indices, their prompts from `first_token` on."""
        rows = rows.to(self.input_ids.device)
        ids, other, mask = (
            tensor[rows, first_token:] for tensor in (self.input_ids, self.counterfactual_ids, self.attention_mask)
        )
        answers, targets = (sets.take(rows) for sets in (self.answer_sets, self.target_sets))
        return TaskPairs(self.task, ids, other, mask, answers, targets, self.direction[rows])

    def to(self, device: torch.device | str) -> TaskPairs:
        """The pairs on another device."""
        ids, other, mask = (
            tensor.to(device) for tensor in (self.input_ids, self.counterfactual_ids, self.attention_mask)
        )
        answers, targets = (sets.to(device) for sets in (self.answer_sets, self.target_sets))
        return TaskPairs(self.task, ids, other, mask, answers, targets, self.direction.to(device))

    def replaced(self, **changes: Any) -> TaskPairs:
        """The pairs with other values of some constructor arguments."""
        values = {name: getattr(self, name) for name in ("task", "input_ids", "counterfactual_ids", "attention_mask")}
        values |= {"answers": self.answer_sets, "targets": self.target_sets, "direction": self.direction}
        return TaskPairs(**(values | changes))

    def __len__(self) -> int:
        return len(self.input_ids)

    def __repr__(self) -> str:
        return f"TaskPairs({self.task!r}, {len(self)} pairs of {self.input_ids.shape[1]} tokens)"


def task_pairs(task: str, tokenizer: Any, n: int, seed: int = 0, max_tokens: int = MAX_TOKENS) -> TaskPairs:
    """Make `n` prompt pairs of a task with any tokenizer (paper table 1; method, section 7).

    `task` is one of `TASKS`. Pairs alternate between the two task orders; equal seeds give equal pairs.
    Both prompts of a pair have the same number of tokens, at most `max_tokens`, and no prompt occurs in two pairs.
    Where both answers begin with the same tokens, these are moved to the prompts, so that the first token decides.
    Returns tensors [n, seq], left-padded. Raises ValueError for an unknown task, for `n` below 1, and if the tokenizer
    does not allow `n` pairs, naming the rule that was broken most often.

    >>> import bridges
    >>> tokenizer = bridges.load_pair().tokenizer
    >>> pairs = bridges.task_pairs("for_while", tokenizer, 2)
    >>> tokenizer.decode(pairs.input_ids[0], skip_special_tokens=True)
    'index = handle(key)\\nfor c'
    >>> tokenizer.decode(pairs.answers[0]), tokenizer.decode(pairs.targets[0])
    (' in', ':')
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
    for draw in range(MAX_DRAWS_PER_PAIR * n):
        example = EXAMPLES[task](rng)
        if draw >= PLAIN_DRAWS_PER_PAIR * n:
            example = with_fillers(example, rng)
        encoded = _encode(tokenizer, example, max_tokens)
        if isinstance(encoded, str):
            broken[encoded] += 1
        elif not drawn.isdisjoint(prompts := (tuple(encoded.first), tuple(encoded.second))):
            broken["one of their prompts occurs in another pair"] += 1
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


def probability(logits: Float[Tensor, "n vocab"], tokens: Int[Tensor, "n tokens"] | TokenSets) -> Float[Tensor, " n"]:
    """The full-vocabulary probability of each row's set of tokens, in at least float32; -1 is no token."""
    return probabilities(logits, tokens)[0]


def probabilities(
    logits: Float[Tensor, "n vocab"], *sets: Int[Tensor, "n tokens"] | TokenSets
) -> list[Float[Tensor, " n"]]:
    """`probability` of several sets of tokens per row, from one softmax."""
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    return [(one if isinstance(one, TokenSets) else TokenSets.of_rows(one)).sums(p) for one in sets]


def solved(logits: Float[Tensor, "n vocab"], pairs: TaskPairs) -> Bool[Tensor, " n"]:
    """Whether the original prompt's answer is more probable than the counterfactual's."""
    answer, target = probabilities(logits, pairs.answer_sets, pairs.target_sets)
    return answer > target


class _Encoded(NamedTuple):
    """Both prompts of a pair in tokens, and the tokens that answer each."""

    first: list[int]
    first_answer: tuple[int, ...]
    second: list[int]
    second_answer: tuple[int, ...]


def _encode(tokenizer: Any, example: Example, max_tokens: int) -> _Encoded | str:
    """The pair in tokens, or the rule that it breaks."""
    encoded = []
    for prompt, answer in ((example.first, example.first_answer), (example.second, example.second_answer)):
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        answer_tokens = _answer_tokens(tokenizer, prompt, ids, answer)
        if not answer_tokens:
            return f"the tokenizer joins {_describe(answer)} with the prompt's end, or has no token for it"
        encoded.append((ids, answer_tokens))
    (first, answer), (second, other) = encoded
    while isinstance(answer, list) and isinstance(other, list) and answer and other and answer[0] == other[0]:
        first, second, answer, other = [*first, answer[0]], [*second, other[0]], answer[1:], other[1:]
    answers = [tuple(tokens[:1]) if isinstance(tokens, list) else tokens for tokens in (answer, other)]
    if not answers[0] or not answers[1] or _overlap(*answers):
        return f"{_describe(example.first_answer)} and {_describe(example.second_answer)} share their first token"
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if len(first) != len(second):
        return "its two prompts differ in length"
    if len(first) + len(bos) > max_tokens:
        return f"the prompts are over max_tokens={max_tokens}"
    return _Encoded(bos + first, answers[0], bos + second, answers[1])


def _answer_tokens(tokenizer: Any, prompt: str, ids: list[int], answer: Answer) -> list[int] | tuple[int, ...]:
    """For text its tokens in order, none if the tokenizer joins it with the prompt; for a pattern all that match."""
    if not isinstance(answer, str):
        return _matching_tokens(tokenizer, answer)
    whole = tokenizer.encode(prompt + answer, add_special_tokens=False)
    return whole[len(ids) :] if whole[: len(ids)] == ids else []


@lru_cache(maxsize=32)
def _matching_tokens(tokenizer: Any, pattern: Any) -> tuple[int, ...]:
    """The tokens whose text begins as the pattern says; cached, since it decodes the whole vocabulary."""
    texts = ((i, tokenizer.decode([i])) for i in range(len(tokenizer)))
    return tuple(i for i, text in texts if pattern.match(text))


@lru_cache(maxsize=8)
def _overlap(tokens: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whether two sets of tokens have one in common; cached, since a pattern's set may be most of the vocabulary."""
    return not set(tokens).isdisjoint(others)


def _describe(answer: Answer) -> str:
    return repr(answer if isinstance(answer, str) else answer.pattern)


def _stack(task: str, encoded: list[_Encoded]) -> TaskPairs:
    """Left-padded tensors, the pairs in alternating task order."""
    ordered = [pair if i % 2 == 0 else _Encoded(*pair[2:], *pair[:2]) for i, pair in enumerate(encoded)]
    width = max(len(pair.first) for pair in ordered)
    ids, counterfactual_ids, mask = (torch.zeros(len(ordered), width, dtype=torch.long) for _ in range(3))
    for row, pair in enumerate(ordered):
        ids[row, -len(pair.first) :] = torch.tensor(pair.first)
        counterfactual_ids[row, -len(pair.second) :] = torch.tensor(pair.second)
        mask[row, -len(pair.first) :] = 1
    answers = TokenSets.of_tuples([pair.first_answer for pair in ordered])
    targets = TokenSets.of_tuples([pair.second_answer for pair in ordered])
    return TaskPairs(task, ids, counterfactual_ids, mask, answers, targets, torch.arange(len(ordered)) % 2)
