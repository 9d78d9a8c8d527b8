"""The attention mask of rows of tokens: 1 at real tokens, 0 at padding; and the positions that follow from it."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor


def zero_one_mask(
    attention_mask: Tensor | None, input_ids: Tensor, name: str = "attention_mask"
) -> Int[Tensor, "*shape"] | None:
    """The mask with 1 at real tokens and 0 at padding; ValueError if it holds anything else, or has another shape.

    Numbers of packed documents (1 1 2 2 0) would count as positions and as weights.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"{name} {tuple(attention_mask.shape)} must have the shape {tuple(input_ids.shape)}")
    real = attention_mask.bool()
    if (odd := attention_mask[real.to(attention_mask.dtype) != attention_mask]).numel():
        raise ValueError(
            f"{name} holds {odd[0].item():g}; it must be 1 at real tokens and 0 at padding. Where it numbers packed "
            "documents, make each document a row of its own"
        )
    return real.long()


def position_ids(attention_mask: Int[Tensor, "b s"]) -> Int[Tensor, "b s"]:
    """Each real token's index within its row, whatever the padding; 0 on padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
