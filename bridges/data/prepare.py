"""The rows of a fit: what trains, what is held out, and which of them each process sees at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

from bridges.config import DEFAULT_SEQ_LEN, FitConfig
from bridges.data.rows import Rows
from bridges.data.sampled import SharedTokens, sampled_text
from bridges.data.sources import ReadLimit, load_rows
from bridges.models.loading import find_tokenizer
from bridges.models.pairing import common_vocabulary, one_sided_tokens
from bridges.models.residual import ResidualModel, context_limit
from bridges.models.tokens import Batch, check_tokens

HELDOUT_FRACTION = 0.05
"""Of the rows, held out where there is no `eval_data`."""
SELECTION_FRACTION = 0.05
"""Of the other rows, set aside to choose ridge penalties and the best state on."""
TRAIN_FRACTION = (1 - HELDOUT_FRACTION) * (1 - SELECTION_FRACTION)
MIN_SAMPLED_HELDOUT_ROWS = 32
MAX_SAMPLED_ROWS = 1024
"""Sampled rows for gradient steps, at most; they are taken more than once where the steps take more."""


def share(n_rows: int, batch_size: int, rank: int, world_size: int) -> list[range]:
    """One process's part of `n_rows` rows: batches of at most `batch_size`, assigned to the processes round-robin.

    All parts together are every row once. With fewer batches than processes some parts are empty; sums over processes
    make up for that.
    """
    starts = range(0, n_rows, batch_size)[rank::world_size]
    return [range(start, min(start + batch_size, n_rows)) for start in starts]


@dataclass(frozen=True)
class FitData:
    """The rows of a fit, and which of them each process sees."""

    train: Rows
    """All rows but the held-out ones."""
    heldout: Rows
    """What is reported is measured on these."""

    @cached_property
    def fitted(self) -> Rows:
        """The training rows that the closed form and the gradient steps see."""
        return self._parts[0]

    @cached_property
    def selection(self) -> Rows:
        """The last 5 % of the training rows, on which ridge penalties and the best state are chosen.

        Of a single training row, that row itself; no ridge penalty is chosen on it.
        """
        return self._parts[1]

    @cached_property
    def _parts(self) -> tuple[Rows, Rows]:
        if len(self.train) < 2:
            return self.train, self.train
        return self.train.split(max(1, round(SELECTION_FRACTION * len(self.train))))

    def fingerprint(self) -> str:
        """A hash of the training and the held-out rows."""
        return f"{self.train.fingerprint()} {self.heldout.fingerprint()}"

    def step_batches(self, config: FitConfig, step: int, rank: int, world_size: int) -> list[Batch]:
        """One process's micro-batches of a step (from 1); all processes' together are the step's global batch."""
        micro = config.gradient_accumulation_steps
        start = ((step - 1) * world_size + rank) * micro * config.batch_size
        fitted = self.fitted
        return [fitted.take(start + i * config.batch_size, config.batch_size) for i in range(micro)]

    def train_batches(self, n_tokens: int, batch_size: int, rank: int, world_size: int) -> list[Batch]:
        """One process's part of the first shuffled training rows, as many as hold `n_tokens`, each row once."""
        fitted = self.fitted
        n_rows = fitted.rows_holding(n_tokens, shuffled=True)
        return [fitted.take(rows.start, len(rows)) for rows in share(n_rows, batch_size, rank, world_size)]

    def start_rows(self, n_tokens: int, n_judging: int) -> int:
        """How many rows `train_batches` and `ridge_batches` give together, over all processes."""
        judging = 0 if len(self.train) < 2 else self.selection.rows_holding(n_judging)
        return self.fitted.rows_holding(n_tokens, shuffled=True) + judging

    def selection_batches(self, n_tokens: int, batch_size: int, rank: int, world_size: int) -> list[Batch]:
        """One process's part of the first rows of the selection, as many as hold `n_tokens`."""
        return _part(self.selection, self.selection.rows_holding(n_tokens), batch_size, rank, world_size)

    def ridge_batches(self, n_tokens: int, batch_size: int, rank: int, world_size: int) -> list[Batch]:
        """`selection_batches`, but none of a single training row, which would judge what was fitted to it."""
        return [] if len(self.train) < 2 else self.selection_batches(n_tokens, batch_size, rank, world_size)

    def heldout_rows(self, config: FitConfig) -> int:
        """How many of the held-out rows the NMSEs are measured on."""
        return self.heldout.rows_holding(config.heldout_tokens)

    def heldout_batches(self, n_rows: int, batch_size: int, rank: int, world_size: int) -> list[Batch]:
        """One process's part of the first held-out rows."""
        return _part(self.heldout, n_rows, batch_size, rank, world_size)


def _part(rows: Rows, n_rows: int, batch_size: int, rank: int, world_size: int) -> list[Batch]:
    return [rows.batch(part.start, part.stop) for part in share(n_rows, batch_size, rank, world_size)]


def prepare(
    dense: ResidualModel,
    sparse: ResidualModel,
    data: Any,
    eval_data: Any,
    tokenizer: Any,
    sources: tuple[Any, Any],
    config: FitConfig,
    world_size: int = 1,
) -> FitData:
    """Load or sample the rows of a fit; ValueError, naming both values, where data and models do not fit together.

    `sources`: the dense and the sparse model as the user named them, which says where their tokenizers are saved.
    """
    saved = saved_tokenizers(sources)
    tokenizer = next((one for one in (tokenizer, *saved) if one is not None), None)
    vocab_size = common_vocabulary(dense, sparse, (tokenizer, tokenizer) if saved == (None, None) else saved)
    one_sided = one_sided_tokens(saved)
    context, seq_len = context_limit(dense, sparse), config.seq_len
    if seq_len is not None and context is not None and seq_len > context:
        raise ValueError(f"seq_len={seq_len} is over the models' context of {context} tokens; pass {context} or less")
    if data is None:
        width = max(dense.d_model, sparse.d_model)
        n_rows = sampled_rows(config, width, seq_len or default_seq_len(context), world_size)
        shared = SharedTokens(vocab_size, frozenset(one_sided))
        prepared = _sampled(dense, shared, n_rows, seq_len or default_seq_len(context), eval_data, tokenizer, config)
    else:
        if isinstance(data, str | PathLike):
            seq_len = seq_len or default_seq_len(context)
        n_rows = config.step_rows(world_size)
        n_tokens = config.closed_form_tokens_for(max(dense.d_model, sparse.d_model))
        enough = ReadLimit(math.ceil(n_rows / TRAIN_FRACTION) + 2, math.ceil(n_tokens / TRAIN_FRACTION))
        rows = load_rows(data, tokenizer, seq_len, enough, config.seed)
        prepared = _with_heldout(rows, eval_data, tokenizer, seq_len, config)
    return FitData(
        _checked("data", prepared.train, one_sided, dense, sparse),
        _checked("eval_data", prepared.heldout, one_sided, dense, sparse),
    )


def heldout_rows(
    dense: ResidualModel,
    sparse: ResidualModel,
    data: Any,
    tokenizer: Any,
    sources: tuple[Any, Any],
    seq_len: int | None,
) -> Rows:
    """`data` as rows to measure on, with the checks that `prepare` makes."""
    one_sided: dict[int, str] = {}
    if isinstance(data, str | PathLike):
        seq_len = seq_len or default_seq_len(context_limit(dense, sparse))
        saved = saved_tokenizers(sources)
        one_sided = one_sided_tokens(saved)
        tokenizer = next((one for one in (tokenizer, *saved) if one is not None), None)
    return _checked("data", load_rows(data, tokenizer, seq_len), one_sided, dense, sparse)


def _checked(name: str, rows: Rows, one_sided: dict[int, str], *models: ResidualModel) -> Rows:
    """The rows, with padding that all models have; ValueError where they hold a token that one model does not know."""
    ids, mask = check_tokens(name, rows.input_ids, rows.attention_mask, *models)
    real = ids if mask is None else ids[mask.bool()]
    for token in sorted(set(real.unique().tolist()) & one_sided.keys()):
        raise ValueError(
            f"{name} holds token {token} ({one_sided[token]!r}), which only one of the two tokenizers has; take it "
            "out, or save one tokenizer with both models"
        )
    return rows if ids is rows.input_ids else Rows(ids, mask, rows.seed)


def default_seq_len(context: int | None) -> int:
    """Tokens per row if no seq_len is given, within a context of so many tokens (None: no limit)."""
    return DEFAULT_SEQ_LEN if context is None else min(DEFAULT_SEQ_LEN, context)


def _with_heldout(rows: Rows, eval_data: Any, tokenizer: Any, seq_len: int | None, config: FitConfig) -> FitData:
    if eval_data is not None:
        enough = ReadLimit(1, config.heldout_tokens)
        seq_len = seq_len or (rows.seq_len if isinstance(eval_data, str | PathLike) else None)
        return FitData(rows, load_rows(eval_data, tokenizer, seq_len, enough, config.seed, name="eval_data"))
    if len(rows) < 2:
        raise ValueError(f"data has {len(rows)} row; fit needs two or more, one of them held out, or pass eval_data")
    return FitData(*rows.split(max(1, round(HELDOUT_FRACTION * len(rows)))))


def sampled_rows(config: FitConfig, width: int, seq_len: int, world_size: int = 1) -> int:
    """Training rows to sample, the selection among them: `sampled_rows`, or as many as the run needs."""
    if config.sampled_rows != "auto":
        return config.sampled_rows
    for_steps = min(config.step_rows(world_size), MAX_SAMPLED_ROWS)
    for_closed_form = math.ceil(config.closed_form_tokens_for(width) / seq_len) if config.closed_form else 0
    return math.ceil(max(for_steps, for_closed_form, 2) / (1 - SELECTION_FRACTION))


def sampled_heldout_rows(config: FitConfig, n_rows: int, seq_len: int) -> int:
    """Held-out rows to sample beside so many for training: 5 % of them, at least 32, and no more than are measured."""
    return min(
        max(MIN_SAMPLED_HELDOUT_ROWS, round(HELDOUT_FRACTION * n_rows)), math.ceil(config.heldout_tokens / seq_len)
    )


def _sampled(
    dense: ResidualModel,
    shared: SharedTokens,
    n_rows: int,
    seq_len: int,
    eval_data: Any,
    tokenizer: Any,
    config: FitConfig,
) -> FitData:
    def rows(n: int, seed: int) -> Rows:
        return Rows(sampled_text(dense, n, seq_len, seed, shared, config.progress), seed=config.seed)

    train = rows(n_rows, 2 * config.seed)
    if eval_data is not None:
        return _with_heldout(train, eval_data, tokenizer, seq_len, config)
    return FitData(train, rows(sampled_heldout_rows(config, n_rows, seq_len), 2 * config.seed + 1))


def saved_tokenizers(sources: tuple[Any, Any]) -> tuple[Any, Any]:
    """The tokenizers that are saved with the dense and with the sparse model, None where there is none."""
    dense, sparse = sources
    first = find_tokenizer(dense)
    return first, first if sparse is dense or sparse == dense else find_tokenizer(sparse)
