"""The rows of a run: what trains, what is held out, and which of them each process sees at each step."""

from __future__ import annotations

import math
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridges.config import DEFAULT_SEQ_LEN, FitConfig
from bridges.data.rows import Rows
from bridges.data.sampled import sampled_text
from bridges.data.sources import Wanted, load_rows
from bridges.models.loading import find_tokenizer
from bridges.models.residual import Batch, ResidualModel, check_tokens, context_limit

HELDOUT = 0.05
"""Part of the rows set aside where there is no `eval_data`."""


class Prepared(NamedTuple):
    """Training and held-out rows."""

    train: Rows
    heldout: Rows

    def fingerprint(self) -> str:
        """A hash of each."""
        return f"{self.train.fingerprint()} {self.heldout.fingerprint()}"

    def step_batches(self, config: FitConfig, step: int, index: int, count: int) -> list[Batch]:
        """One process's micro-batches of a step (from 1); all processes' together are the step's global batch."""
        micro = config.gradient_accumulation_steps
        start = ((step - 1) * count + index) * micro * config.batch_size
        return [self.train.take(start + i * config.batch_size, config.batch_size) for i in range(micro)]

    def closed_form_batches(self, config: FitConfig, index: int, count: int) -> list[Batch]:
        """One process's part of the first shuffled rows, as many as `closed_form_tokens` asks for; never empty."""
        rows = min(len(self.train), math.ceil(config.closed_form_tokens / self.train.seq_len))
        size = max(1, min(config.batch_size, rows // count))
        batches = [self.train.take(i, min(size, rows - i)) for i in range(0, rows, size)]
        # Too few to share: the same rows on every process, whose sum has the same solution.
        return batches[index::count] if len(batches) >= count else batches

    def pair_batches(self, config: FitConfig, index: int, count: int) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        """One process's part of the rows for the interchange loss, with two random numbers per row."""
        rows = min(len(self.train), config.interchange_pairs)
        draws = torch.rand(rows, 2, generator=torch.Generator().manual_seed(config.seed))
        starts = range(0, rows, config.batch_size)[index::count]
        parts = [draws[start : start + config.batch_size] for start in starts]
        return [(*self.train.take(start, len(part)), part) for start, part in zip(starts, parts, strict=True)]

    def heldout_batches(self, config: FitConfig, index: int, count: int) -> tuple[list[Batch], bool]:
        """One process's part of the held-out rows and True; all of them and False where there are too few to share."""
        rows = min(len(self.heldout), math.ceil(config.eval_tokens / self.heldout.seq_len))
        size = max(1, min(config.batch_size, rows // count))
        batches = self.heldout.in_order(size, rows)
        return (batches, False) if len(batches) < count else (batches[index::count], True)


def prepare(
    dense: ResidualModel,
    sparse: ResidualModel,
    data: Any,
    eval_data: Any,
    tokenizer: Any,
    sources: tuple[Any, Any],
    config: FitConfig,
    processes: int = 1,
) -> Prepared:
    """Load or sample the rows of a run; ValueError, naming both values, where data and models do not fit together."""
    tokenizer = _one_tokenizer(tokenizer, sources)
    limit = context_limit(dense, sparse)
    seq_len = config.seq_len
    if seq_len is not None and limit is not None and seq_len > limit:
        raise ValueError(f"seq_len={seq_len} is over the models' context of {limit} tokens; pass {limit} or less")
    if data is None or isinstance(data, str | PathLike):
        seq_len = seq_len or min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN)
    if data is None:
        prepared = _sampled(dense, seq_len or DEFAULT_SEQ_LEN, eval_data, tokenizer, config)
    else:
        n_rows = config.steps * config.batch_size * config.gradient_accumulation_steps * processes
        n_rows = max(n_rows, config.interchange_pairs if config.interchange_weight else 0)
        wanted = Wanted(math.ceil(n_rows / (1 - HELDOUT)) + 1, math.ceil(config.closed_form_tokens / (1 - HELDOUT)))
        rows = load_rows(data, tokenizer, seq_len, wanted, config.seed)
        prepared = _with_heldout(rows, eval_data, tokenizer, seq_len, config)
    for name, part in (("data", prepared.train), ("eval_data", prepared.heldout)):
        check_tokens(name, part.input_ids, part.attention_mask, dense, sparse)
    return prepared


def heldout_rows(
    dense: ResidualModel,
    sparse: ResidualModel,
    data: Any,
    tokenizer: Any,
    sources: tuple[Any, Any],
    seq_len: int | None,
) -> Rows:
    """`data` as rows to measure on, with the checks that `prepare` makes."""
    limit = context_limit(dense, sparse)
    if isinstance(data, str | PathLike):
        seq_len = seq_len or min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN)
        tokenizer = _one_tokenizer(tokenizer, sources)
    rows = load_rows(data, tokenizer, seq_len)
    check_tokens("data", rows.input_ids, rows.attention_mask, dense, sparse)
    return rows


def _with_heldout(rows: Rows, eval_data: Any, tokenizer: Any, seq_len: int | None, config: FitConfig) -> Prepared:
    if eval_data is not None:
        wanted = Wanted(1, config.eval_tokens)
        seq_len = seq_len or (rows.seq_len if isinstance(eval_data, str | PathLike) else None)
        return Prepared(rows, load_rows(eval_data, tokenizer, seq_len, wanted, config.seed, name="eval_data"))
    if len(rows) < 2:
        raise ValueError(f"data has {len(rows)} row; fit needs two or more, one of them held out, or pass eval_data")
    return Prepared(*rows.split(max(1, round(HELDOUT * len(rows)))))


def _sampled(dense: ResidualModel, seq_len: int, eval_data: Any, tokenizer: Any, config: FitConfig) -> Prepared:
    def rows(n: int, seed: int) -> Rows:
        return Rows(sampled_text(dense, n, seq_len, seed), seed=config.seed)

    train = rows(config.sampled_rows, 2 * config.seed)
    if eval_data is not None:
        return _with_heldout(train, eval_data, tokenizer, seq_len, config)
    n_heldout = max(1, min(round(HELDOUT * config.sampled_rows), math.ceil(config.eval_tokens / seq_len)))
    return Prepared(train, rows(n_heldout, 2 * config.seed + 1))


def _one_tokenizer(given: Any, sources: tuple[Any, Any]) -> Any:
    """The tokenizer to use; ValueError where both models bring one and they differ."""
    dense, sparse = (find_tokenizer(source) for source in sources)
    if dense is not None and sparse is not None and dense.get_vocab() != sparse.get_vocab():
        raise ValueError(
            f"dense and sparse have different tokenizers, {len(dense)} and {len(sparse)} tokens that do not agree; "
            "bridges need one tokenizer for both"
        )
    return next((t for t in (given, dense, sparse) if t is not None), None)
