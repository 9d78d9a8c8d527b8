"""Where the gradient steps of a run start: fitted bridges, or what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bridges.fitting.checkpoint import Checkpoint
from bridges.fitting.interchange import QuadraticTerm, terms_from_tensors
from bridges.objective.hybrid import ModelPair

INTERCHANGE_FILE = "carried"
"""The file of the interchange loss in a checkpoint, under its first name, so that older checkpoints resume."""


@dataclass(frozen=True)
class StartState:
    """What a `Trainer` starts from, besides the tensors that the bridges and the sparse model already hold."""

    step: int = 0
    """Steps done."""
    interchange: Sequence[QuadraticTerm] = ()
    """The interchange loss of every site; empty without that loss."""
    supports: Mapping[str, Tensor] | None = None
    """Masks of the entries that train in a sparse model whose zeros stay; None: those that are not zero now."""
    bridge_optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    """As `optimizer_tensors` gives it; empty before the first step."""
    sparse_optimizer: Mapping[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def start_from_checkpoint(pair: ModelPair, checkpoint: Checkpoint) -> StartState:
    """Copy a checkpoint's tensors into the bridges, and into the sparse model if it trains; returns the rest."""
    tensors = checkpoint.tensors
    for name, tensor in pair.bridge_set.tensors().items():
        tensor.copy_(tensors["bridges"][name])
    if "sparse" in tensors:
        for name, parameter in pair.sparse.model.named_parameters():
            parameter.copy_(tensors["sparse"][name])
    interchange = []
    if INTERCHANGE_FILE in tensors:
        interchange = terms_from_tensors(pair.bridge_set.sites, tensors[INTERCHANGE_FILE], pair.dense.device)
    return StartState(
        checkpoint.step,
        interchange,
        tensors.get("supports"),
        tensors.get("bridge_optimizer", {}),
        tensors.get("sparse_optimizer", {}),
    )
