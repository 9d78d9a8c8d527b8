"""First-order effects of channel edits on a task's answer (attribution patching): one backward pass for all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.channels.prompts import Prompts, entry_points, p_target, sparse_delta_at
from bridges.models.residual import ResidualModel
from bridges.objective.hybrid import ModelPair, Side
from bridges.steering.delta import EntryPoint, stream_to_read_transpose
from bridges.tasks.pairs import TaskPairs


class Location(NamedTuple):
    """Where an edit is made: a bridged site, by its index in the bridge set, and its entry point there."""

    bridge: int
    at: EntryPoint


Effects = dict[Location, Float[Tensor, " d_sparse"]]
"""A figure for every sparse channel at every location."""


def predicted_effects(pair: ModelPair, prompts: Prompts, side: Side = "dense") -> Effects:
    """Predict the change of one model's mean log P(target) under every single-channel edit, in nats.

    Per channel the sum over prompts and tokens of what its edit adds, times the gradient where it is added; what it
    adds to the dense model is dz times the decoder's column (method, section 4).
    """
    gradients = _gradients(pair.model(side), prompts.pairs)
    effects: Effects = {}
    for i, bridge in enumerate(pair.bridge_set):
        site = pair.site(side, i)
        for at in entry_points(pair, i):
            gradient = gradients[at][site]
            if side == "sparse":
                delta = sparse_delta_at(prompts, i, at).to(gradient)
                effects[Location(i, at)] = torch.einsum("bsc,bsc->c", gradient, delta)
                continue
            if at == "read":
                gradient = stream_to_read_transpose(pair.dense.norm(site), bridge.rms_dense, gradient)
            dz = prompts.dz[i]
            weight = bridge.decoder_weight.detach().to(dz)
            effects[Location(i, at)] = torch.einsum("bsd,dc,bsc->c", gradient.to(dz), weight, dz)
    return effects


def _gradients(model: ResidualModel, pairs: TaskPairs) -> dict[EntryPoint, list[Float[Tensor, "b s d"]]]:
    """The gradient of the mean log P(target) at every site, with respect to the stream and to the read."""
    read_offsets: list[Tensor] = []  # zeros, added to the reads so that autograd gives a gradient there

    def add_offset(read: Tensor) -> Tensor:
        read_offsets.append(torch.zeros_like(read, requires_grad=True))
        return read + read_offsets[-1]

    with torch.enable_grad(), model.hook_reads({i: add_offset for i in range(len(model.sites))}):
        trace = model.trace(pairs.input_ids.to(model.device), pairs.attention_mask.to(model.device), True)
        objective = mean_log(p_target(trace.logits, pairs))
        gradients = torch.autograd.grad(objective, [*trace.residuals, *read_offsets])
    n_sites = len(read_offsets)
    return {"residual": list(gradients[:n_sites]), "read": list(gradients[n_sites:])}


def mean_log(p: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """The mean logarithm of probabilities, finite where one has underflowed to 0."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).log().mean()


def top_channels(effects: Float[Tensor, " d_sparse"], n: int) -> list[int]:
    """The `n` channels of largest effect, largest first."""
    return effects.topk(min(n, len(effects))).indices.tolist()
