"""counterfactual(): the edit that replaces one prompt's reading of a channel by another prompt's (paper A.4).

Read: the sublayer's input, after the norm. Reading: the value of a channel in the read.
"""

from __future__ import annotations

from numbers import Integral
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from bridges.models.loading import as_residual
from bridges.models.modes import frozen
from bridges.models.residual import ResidualModel, check_tokens
from bridges.steering.delta import changed_reads
from bridges.steering.edits import Edit


def counterfactual(
    sparse: nn.Module | ResidualModel | str | Path,
    site: str,
    channel: int,
    input_ids: Int[Tensor, "batch seq"],
    counterfactual_ids: Int[Tensor, "batch other_seq"],
    attention_mask: Int[Tensor, "batch seq"] | None = None,
) -> Edit:
    """Build the edit that gives a channel the reading it has on another prompt, token by token (paper A.4).

    `sparse` is a model object, a `ResidualModel`, a folder or a hub id. The edit adds
    dn[t] = n^s_counterfactual[t] - n^s_presented[t], in read units, [batch, seq]; both prompts run through the sparse
    model. It is zero on padding and after the prompt. Raises ValueError if the prompts differ in shape, or if the site
    or channel does not exist.

    >>> import bridges, torch
    >>> pair = bridges.load_pair()
    >>> prompt, other = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 8]]).split(1)
    >>> edit = counterfactual(pair.sparse, "1.attn", 3, prompt, other)
    >>> edit.mode, edit.value.shape, edit.value[:, :2]  # the prompts are equal up to their third token
    ('add', torch.Size([1, 4]), tensor([[0., 0.]]))
    """
    residual_model = as_residual(sparse)
    index = residual_model.index(site)
    if not isinstance(channel, Integral) or not 0 <= channel < residual_model.d_model:
        raise ValueError(
            f"channel={channel!r} must lie between 0 and {residual_model.d_model - 1}, the sparse stream's channels"
        )
    for name, ids in (("input_ids", input_ids), ("counterfactual_ids", counterfactual_ids)):
        check_tokens(name, ids, None, residual_model, least=1)
    with frozen(residual_model.model), torch.no_grad():
        dn = changed_reads(residual_model, input_ids, counterfactual_ids, attention_mask)[index]
    return Edit(site, channel, dn[..., channel], "add")
