"""First-order effects of channel edits on a task's answer (attribution patching): one backward pass for all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.channels.prompts import entry_points
from bridges.channels.runs import PromptRun, Prompts, last_token
from bridges.io.progress import Bar
from bridges.models.residual import Context, ResidualModel
from bridges.objective.pair import ModelPair, Side
from bridges.steering.delta import EntryPoint, at_least_float32, stream_to_read_transpose
from bridges.tasks.pairs import TaskPairs, probability


class Location(NamedTuple):
    """Where an edit is made: a bridged site, by its index in the bridge set, and its entry point there."""

    bridge: int
    at: EntryPoint


Effects = dict[Location, Float[Tensor, " d_sparse"]]
"""A figure for every sparse channel at every location."""


def predicted_effects(pair: ModelPair, prompts: Prompts, side: Side = "dense", bar: Bar | None = None) -> Effects:
    """Predict the change of one model's mean log P(target) under every single-channel edit, in nats.

    Per channel the sum over prompts and tokens of what its edit adds, times the gradient where it is added; what it
    adds to the dense model is dz times the decoder's column (method, section 4). Batches are added up in float64.
    """
    bridges = range(len(pair.bridge_set))
    locations = [Location(i, at) for i in bridges for at in entry_points(pair, i)]
    effects: Effects = {}
    for run in prompts.runs(bridges):
        gradients = _gradients(pair.model(side), run.side(side).context, run.pairs, len(prompts))
        for location in locations:
            gradient = at_least_float32(gradients[location.at][pair.site(side, location.bridge)])
            effect = _effects_at(pair, run, gradient, location, side).double()
            effects[location] = effects[location] + effect if location in effects else effect
        if bar is not None:
            bar.advance(len(run.rows))
    return effects


def _effects_at(
    pair: ModelPair, run: PromptRun, gradient: Float[Tensor, "b s d"], location: Location, side: Side
) -> Float[Tensor, " d_sparse"]:
    """One batch's part of the effects at a location."""
    i, at = location
    kept = slice(-gradient.shape[1], None)  # the read at `final` may be that of the last token alone
    if side == "sparse":
        return torch.einsum("bsc,bsc->c", gradient, run.delta(i, at)[:, kept].to(gradient))
    bridge = pair.bridge_set[i]
    if at == "read":
        gradient = stream_to_read_transpose(pair.dense.norm(pair.site("dense", i)), bridge.rms_dense, gradient)
    dz = run.dz[i][:, kept]
    weight = bridge.decoder_weight.detach().to(dz)
    return torch.einsum("bsd,dc,bsc->c", gradient.to(dz), weight, dz)


def _gradients(
    model: ResidualModel, context: Context, pairs: TaskPairs, n_prompts: int
) -> dict[EntryPoint, list[Float[Tensor, "b _ d"]]]:
    """The gradient of a batch's part of the mean log P(target) over `n_prompts`, at every site and token of a context.

    With respect to the stream and to the read.
    """
    read_offsets: list[Tensor] = []  # zeros, added to the reads so that autograd gives a gradient there

    def add_offset(read: Tensor) -> Tensor:
        read_offsets.append(torch.zeros_like(read, requires_grad=True))
        return read + read_offsets[-1]

    with torch.enable_grad(), model.hook_reads({i: add_offset for i in range(len(model.sites))}):
        trace = model.trace_in(context, differentiable=True, with_logits=False)
        last = model.logits_at(trace.residuals[-1], context, last_token(context.input_ids))[:, 0]
        objective = log_probability(probability(last, pairs.target_sets)).sum() / n_prompts
        gradients = torch.autograd.grad(objective, [*trace.residuals, *read_offsets])
    n_sites = len(read_offsets)
    return {"residual": list(gradients[:n_sites]), "read": list(gradients[n_sites:])}


def log_probability(p: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The logarithm of probabilities, finite where one has underflowed to 0."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).log()


def top_channels(effects: Float[Tensor, " d_sparse"], n: int) -> list[int]:
    """The `n` channels of largest effect, largest first."""
    return effects.topk(min(n, len(effects))).indices.tolist()
