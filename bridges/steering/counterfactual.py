"""counterfactual(): the edit that replaces one prompt's reading of a channel by another prompt's (paper A.4).

Read: the sublayer's input, after the norm. Reading: the value of a channel in the read.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridges.models.loading import as_residual
from bridges.models.modes import frozen
from bridges.models.residual import ResidualModel
from bridges.models.tokens import check_tokens
from bridges.steering.delta import changed_reads, check_shapes
from bridges.steering.edits import Edit

MAX_TOKENS = 2048
"""Tokens that run at once: memory does not grow with the number of rows."""


@overload
def counterfactual(
    sparse: nn.Module | ResidualModel | str | Path,
    site: str,
    channel: int,
    input_ids: Int[Tensor, "batch seq"],
    counterfactual_ids: Int[Tensor, "batch other_seq"],
    attention_mask: Int[Tensor, "batch seq"] | None = None,
) -> Edit: ...


@overload
def counterfactual(
    sparse: nn.Module | ResidualModel | str | Path,
    site: str,
    channel: Sequence[int],
    input_ids: Int[Tensor, "batch seq"],
    counterfactual_ids: Int[Tensor, "batch other_seq"],
    attention_mask: Int[Tensor, "batch seq"] | None = None,
) -> list[Edit]: ...


def counterfactual(
    sparse: nn.Module | ResidualModel | str | Path,
    site: str,
    channel: int | Sequence[int],
    input_ids: Int[Tensor, "batch seq"],
    counterfactual_ids: Int[Tensor, "batch other_seq"],
    attention_mask: Int[Tensor, "batch seq"] | None = None,
) -> Edit | list[Edit]:
    """Build the edit that gives a channel the reading it has on another prompt, token by token (paper A.4).

    `sparse` is a model object, a `ResidualModel`, a folder or a hub id. The edit adds
    dn[t] = n^s_counterfactual[t] - n^s_presented[t], in read units, [batch, seq]; both prompts run through the sparse
    model up to the site. It is zero on padding and after the prompt. For a sequence of channels the result is a list
    with the edit of each, from the same two runs. Raises ValueError if the prompts differ in shape, or if the site or a
    channel does not exist.

    >>> import bridges, torch
    >>> pair = bridges.load_pair()
    >>> prompt, other = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 8]]).split(1)
    >>> edit = counterfactual(pair.sparse, "1.attn", 3, prompt, other)
    >>> edit.mode, edit.value.shape, edit.value[:, :2]  # the prompts are equal up to their third token
    ('add', torch.Size([1, 4]), tensor([[0., 0.]]))
    >>> [edit.channel for edit in counterfactual(pair.sparse, "1.attn", (3, 18), prompt, other)]
    [3, 18]
    """
    residual_model = as_residual(sparse)
    index = residual_model.index(site)
    channels = _checked_channels(channel, residual_model.d_model)
    input_ids, mask = check_tokens("input_ids", input_ids, attention_mask, residual_model, least=1)
    if isinstance(counterfactual_ids, Tensor):
        check_shapes(input_ids, counterfactual_ids)
    other_ids, _ = check_tokens("counterfactual_ids", counterfactual_ids, mask, residual_model, least=1)
    with frozen(residual_model.model), torch.no_grad():
        dn = _changes(residual_model, index, channels, input_ids, other_ids, mask)
    edits = [Edit(site, int(c), dn[..., i], "add") for i, c in enumerate(channels)]
    return edits[0] if isinstance(channel, Integral) else edits


def _checked_channels(channel: int | Sequence[int], width: int) -> list[int]:
    """The channels as a list; ValueError unless they exist."""
    channels: list[int] = [channel] if isinstance(channel, Integral) else channel  # pyright: ignore
    if not isinstance(channels, Sequence) or isinstance(channels, str) or not channels:
        raise ValueError(f"channel={channel!r} must be a channel's number, or a list of one or more")
    for c in channels:
        if isinstance(c, bool) or not isinstance(c, Integral) or not 0 <= c < width:
            raise ValueError(f"channel={c!r} must lie between 0 and {width - 1}, the sparse stream's channels")
    return list(channels)


def _changes(
    sparse: ResidualModel,
    site: int,
    channels: list[int],
    input_ids: Int[Tensor, "b s"],
    counterfactual_ids: Int[Tensor, "b s"],
    attention_mask: Int[Tensor, "b s"] | None,
) -> Float[Tensor, "b s channels"]:
    """dn of these channels, a few rows at a time."""
    n_rows, width = input_ids.shape
    size = max(1, MAX_TOKENS // width)
    parts = []
    for start in range(0, n_rows, size):
        rows = slice(start, start + size)
        ids, other = (x[rows].to(sparse.device) for x in (input_ids, counterfactual_ids))
        mask = None if attention_mask is None else attention_mask[rows].to(sparse.device)
        (dn,) = changed_reads(sparse, ids, other, mask, [site])
        parts.append(dn[..., channels])
    return torch.cat(parts)
