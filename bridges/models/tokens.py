"""Whether models can run on token ids and their mask: form, context and vocabulary."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bridges.models.attention_mask import zero_one_mask
from bridges.models.residual import ResidualModel, context_limit

Batch = tuple[Tensor, Tensor | None]
"""input_ids and attention_mask, [batch, seq] each; None where nothing is padding."""


def check_tokens(
    name: str, input_ids: Any, attention_mask: Tensor | None, *models: ResidualModel, least: int = 2
) -> Batch:
    """The token ids and their mask as all models take them.

    The mask that is returned holds 0 and 1. Ids under padding that a model does not have (a padding token that was
    added to one side alone) are replaced by 0: no real token reads them.

    Raises ValueError unless all models can run on these token ids, and one row at least has `least` real tokens.
    """
    ids = isinstance(input_ids, Tensor) and input_ids.ndim == 2 and not input_ids.is_floating_point()
    if not ids or not input_ids.numel():
        what = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"{name}={what} must be a tensor of token ids [rows, seq]")
    attention_mask = zero_one_mask(attention_mask, input_ids)
    limit, width = context_limit(*models), input_ids.shape[1]
    if limit is not None and width > limit:
        raise ValueError(f"{name} has rows of {width} tokens, over the models' context of {limit}; cut them to that")
    if attention_mask is not None:
        unknown = (input_ids < 0) | (input_ids >= min(model.vocab_size for model in models))
        padding = unknown & (attention_mask == 0).to(input_ids.device)
        input_ids = input_ids.masked_fill(padding, 0) if padding.any() else input_ids
    check_vocabulary(name, input_ids, *models)
    most = width if attention_mask is None else int(attention_mask.sum(1).max())
    if most < least:
        raise ValueError(f"{name} has rows of {most} real token(s); it must have one of {least} or more")
    return input_ids, attention_mask


def check_vocabulary(name: str, input_ids: Tensor, *models: ResidualModel) -> None:
    """ValueError unless every token id is in all models' vocabularies."""
    low, high, sizes = int(input_ids.min()), int(input_ids.max()), sorted({model.vocab_size for model in models})
    if low < 0 or high >= sizes[0]:
        both = f" (the models have {sizes[0]} and {sizes[-1]} tokens)" if len(sizes) > 1 else ""
        raise ValueError(f"{name} holds token {low if low < 0 else high}; valid ids are 0 to {sizes[0] - 1}{both}")
