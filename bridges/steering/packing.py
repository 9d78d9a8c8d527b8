"""Calls whose rows are not one document each, which edits that depend on tokens cannot follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from bridges.data.packing import BOUNDARIES, DOCUMENTS, LENGTHS, refuse_other_meanings
from bridges.models.attention_mask import position_ids
from bridges.steering.model_call import ModelCall


def refuse_packing(call: ModelCall) -> None:
    """ValueError naming the argument of a model call that says that a row holds several documents."""
    _refuse(call.input_ids, call.attention_mask, call.n_past, call.arguments)


def refuse_packed_prompt(input_ids: Int[Tensor, "b s"], arguments: Mapping[str, Any]) -> None:
    """The same of the arguments that `generate` is given beside its prompt."""
    mask = arguments.get("attention_mask")
    same_width = isinstance(mask, Tensor) and mask.shape == input_ids.shape
    _refuse(input_ids, mask if same_width else None, 0, arguments)


def _refuse(ids: Tensor, mask: Tensor | None, n_past: int, arguments: Mapping[str, Any]) -> None:
    mask = ids.new_ones(len(ids), n_past + ids.shape[1]) if mask is None else mask
    columns = (*(name for name in DOCUMENTS if name != "token_type_ids"), *BOUNDARIES, *LENGTHS)
    given = {name: arguments[name] for name in columns if arguments.get(name) is not None}
    if given:
        rows = list(zip(ids, mask[:, n_past:], strict=True))
        refuse_other_meanings(given, rows, "a call of the steered model")
    positions = arguments.get("position_ids")
    if positions is not None:
        _check_positions(positions, mask[:, n_past:].bool(), position_ids(mask)[:, n_past:])


def _check_positions(given: Tensor, real: Tensor, counted: Tensor) -> None:
    """ValueError where positions go back in a row. They may begin later than at 0, and padding may have any."""
    given, counted = given.to(real.device), counted.to(real.device)
    if several_axes := given.ndim == 3:  # of text or of time; the tokens of one image share a position
        given = given[0]
    if given.shape[-1] != real.shape[1] or given.shape[:-1] not in ((), (1,), (len(real),)):
        raise ValueError(f"position_ids {tuple(given.shape)} must have the shape {tuple(real.shape)} of input_ids")
    ahead = given.expand_as(real) - (0 if several_axes else counted)  # grows where a position is left out
    ahead = ahead.masked_fill(~real, torch.iinfo(ahead.dtype).min)
    wrong = real & (ahead < ahead.cummax(1).values.clamp(min=0))
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids go back to {int(given.expand_as(real)[row, column])} at column {column} of row {row}, as "
            "where several documents are packed into one row, which edits that depend on the tokens cannot follow: "
            "make each document a row of its own, or use edits that add one number everywhere"
        )
