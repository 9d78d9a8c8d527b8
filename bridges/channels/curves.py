"""P(target) over strengths: of an edit, and of every baseline that is added in the edit's place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.channels.baselines import dense_directions
from bridges.channels.prompts import Channels, Prompts, edit_addend, p_target
from bridges.models.residual import ResidualModel, Trace
from bridges.objective.hybrid import ModelPair
from bridges.steering.delta import EntryPoint, dense_addend, edited_logits, random_addends
from bridges.tasks.pairs import TaskPairs

RANDOM_DIRECTIONS = 20
RESAMPLES = 1000


class Curve(NamedTuple):
    """P(target), one entry per strength."""

    mean: list[float]
    """Over prompts."""
    low: list[float]
    """Lower end of the 95 % interval of the mean (percentile bootstrap over prompts)."""
    high: list[float]
    """Upper end."""


def edit_curves(
    pair: ModelPair, chosen_on: Prompts, reported: Prompts, chosen: Channels, strengths: Sequence[float]
) -> dict[str, Float[Tensor, "strengths prompts"]]:
    """P(target) of the reported prompts, for the edit and for everything that is added where the edit enters."""
    bridge = pair.bridge_set.index(chosen.site)
    dense_site, sparse_site = pair.site("dense", bridge), pair.site("sparse", bridge)
    traces, pairs, at = reported.traces, reported.pairs, chosen.at
    curves = {}
    for name, addends in dense_addends(pair, chosen_on, reported, chosen).items():
        of_each = [p_target_curve(pair.dense, traces.dense, pairs, dense_site, one, strengths, at) for one in addends]
        curves[name] = torch.stack(of_each).mean(0)
    in_sparse = edit_addend(pair, reported, chosen, "sparse")
    curves["p_target_sparse_model"] = p_target_curve(
        pair.sparse, traces.sparse, pairs, sparse_site, in_sparse, strengths, at
    )
    return curves


def dense_addends(
    pair: ModelPair, chosen_on: Prompts, reported: Prompts, chosen: Channels
) -> dict[str, Iterable[Float[Tensor, "b s d_dense"]]]:
    """What each curve adds to the dense model where the edit enters, at strength 1; several addends are averaged over.

    Random directions, mean difference and probe have the edit's own norm at every token.
    """
    bridge, direction = pair.bridge_set.index(chosen.site), reported.pairs.direction
    edit = edit_addend(pair, reported, chosen)
    norm = edit.norm(dim=-1, keepdim=True)
    mean_difference, probe = dense_directions(pair, chosen_on, chosen)
    return {
        "p_target": [edit],
        "p_target_random_direction": random_addends(edit, RANDOM_DIRECTIONS, seed=1),
        "p_target_mean_difference_equal_norm": [mean_difference[direction][:, None] * norm],
        "p_target_probe": [probe[direction][:, None] * norm],
        "p_target_all_channels": [dense_addend(pair, bridge, reported.dz[bridge], chosen.at)],
    }


def p_target_curve(
    model: ResidualModel,
    trace: Trace,
    pairs: TaskPairs,
    site: int,
    addend: Float[Tensor, "b s d"],
    strengths: Sequence[float],
    at: EntryPoint,
) -> Float[Tensor, "strengths prompts"]:
    """P(target) of every prompt at every strength of an addend."""
    logits = (edited_logits(model, trace, site, strength * addend, at) for strength in strengths)
    return torch.stack([p_target(one, pairs) for one in logits])


def with_band(values: Float[Tensor, "strengths prompts"]) -> Curve:
    """The mean over prompts, with its 95 % interval."""
    import numpy as np
    from scipy.stats import bootstrap

    rows = values.double().cpu().numpy()
    drawn = {"n_resamples": RESAMPLES, "method": "percentile", "rng": np.random.default_rng(0)}
    low, high = bootstrap((rows,), np.mean, axis=1, **drawn).confidence_interval
    return Curve(rows.mean(1).tolist(), low.tolist(), high.tolist())
