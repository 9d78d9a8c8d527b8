"""What a batch holds besides its tokens: refused where it changes what the rows mean, ignored where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from bridges.models.attention_mask import position_ids

POSITIONS = ("position_ids", "input_pos")
"""Each token's position; must count the row's real tokens from 0."""
DOCUMENTS = ("seq_idx", "document_ids", "doc_ids", "segment_ids", "sequence_ids", "token_type_ids")
"""The number of each token's document or segment; must be one number per row."""
BOUNDARIES = ("cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
"""Where each document begins in the batch, and its end; must be one document per row."""
LENGTHS = ("seq_lens", "seq_lengths")
"""The lengths of the documents in the batch; must be one per row."""
OTHER_INPUTS = (
    *("inputs_embeds", "pixel_values", "pixel_values_videos", "input_features", "input_values"),
    *("decoder_input_ids", "encoder_hidden_states", "past_key_values"),
)
"""Inputs of a model that tokens and a mask cannot stand for."""

Row = tuple[Tensor, Tensor]
"""Token ids [seq], and a mask [seq] of 1 at the real ones."""


def refuse_other_meanings(batch: Mapping[str, Any], rows: Sequence[Row], name: str = "data") -> None:
    """ValueError if a batch, which was read as `rows`, is more than rows of one document each.

    Every row is run from position 0, and each of its tokens reads all real ones before it. Columns that say nothing
    about that (labels, texts, lengths of rows) are ignored.
    """
    for key in OTHER_INPUTS:
        if batch.get(key) is not None:
            raise ValueError(f"{name}: a batch has {key}, which bridges do not take; give input_ids alone")
    for key in POSITIONS:
        given = _as_rows(batch.get(key))
        given = given * len(rows) if len(given) == 1 else given  # one row of positions is for all rows
        for i, (positions, (ids, real)) in enumerate(zip(given, rows, strict=False)):
            if positions.shape != ids.shape or (positions != position_ids(real[None])[0])[real != 0].any():
                raise _packed(name, f"{key} of row {i} do not count its real tokens from 0")
    for key in DOCUMENTS:
        for i, (numbers, (ids, real)) in enumerate(zip(_as_rows(batch.get(key)), rows, strict=False)):
            known = set(numbers[real != 0].tolist()) if numbers.shape == ids.shape else set()
            if len(known) > 1 or (key == "token_type_ids" and known - {0}):
                raise _packed(name, f"{key} of row {i} has the values {sorted(known)}")
    for key in (*BOUNDARIES, *LENGTHS):
        documents = _count(batch.get(key)) - (key in BOUNDARIES)
        if documents > len(rows):
            raise _packed(name, f"{key} has {documents} documents in {len(rows)} row(s)")


def _packed(name: str, found: str) -> ValueError:
    return ValueError(
        f"{name}: {found}; rows that several documents are packed into are not supported: make each document a row "
        "of its own (with a collator that pads, not one that flattens)"
    )


def _as_rows(value: Any) -> list[Tensor]:
    """Each row's numbers; none where `value` is not of numbers."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple | Tensor):
        return [row for one in value for row in _as_rows(one)]
    return list(torch.atleast_2d(torch.as_tensor(value))) if _count(value) else []


def _count(value: Any) -> int:
    """How many numbers there are in nested lists or a tensor."""
    if isinstance(value, list | tuple):
        return sum(map(_count, value))
    if isinstance(value, Number):
        return 1
    return int(torch.as_tensor(value).numel()) if hasattr(value, "shape") else 0
