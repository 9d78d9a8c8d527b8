"""Where the gradient steps of a run start: fitted bridges, or what a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bridges.fitting.checkpoint import Checkpoint
from bridges.fitting.selection import BestState
from bridges.fitting.standardized import Standardizations, standardizations_from
from bridges.objective.pair import ModelPair

STANDARDIZED_FILE = "standardized"
BEST_FILE = "best"


@dataclass(frozen=True)
class StartState:
    """What a `Trainer` starts from, besides the tensors that the bridges and the sparse model already hold."""

    step: int = 0
    """Steps done."""
    standardizations: Standardizations = ()
    """Mean and standard deviation of the streams at every site; the gradient steps run between standardised streams."""
    standardized: Mapping[str, Tensor] = field(default_factory=dict)
    """The standardised maps, bit for bit as they were; empty at the start: those of the bridges."""
    best: BestState | None = None
    """The best state so far; None before the first measurement."""
    supports: Mapping[str, Tensor] | None = None
    """Masks of the entries that train in a sparse model whose zeros stay; None: those that are not zero now."""
    bridge_optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    """As `optimizer_tensors` gives it; empty before the first step."""
    sparse_optimizer: Mapping[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def start_from_checkpoint(pair: ModelPair, checkpoint: Checkpoint) -> StartState:
    """Copy a checkpoint's tensors into the bridges, and into the sparse model if it trains; returns the rest."""
    tensors = checkpoint.tensors
    stored = tensors["bridges"]
    for name, tensor in pair.bridge_set.tensors().items():
        if name in stored:  # runs of earlier versions know no massive tokens
            tensor.copy_(stored[name])
    if "sparse" in tensors:
        for name, parameter in pair.sparse.model.named_parameters():
            parameter.copy_(tensors["sparse"][name])
    standardized = tensors.get(STANDARDIZED_FILE, {})
    return StartState(
        checkpoint.step,
        standardizations_from(standardized, len(pair.bridge_set), pair.dense.device) if standardized else (),
        standardized,
        _best(checkpoint),
        tensors.get("supports"),
        tensors.get("bridge_optimizer", {}),
        tensors.get("sparse_optimizer", {}),
    )


def _best(checkpoint: Checkpoint) -> BestState | None:
    """The best state that a checkpoint holds."""
    stored = checkpoint.state.get("best")
    if stored is None:
        return None
    step, *objectives = stored
    objective, at_start = (math.nan if one is None else one for one in objectives)  # JSON has no other way to say so
    return BestState(step, objective, at_start, checkpoint.tensors.get(BEST_FILE))
