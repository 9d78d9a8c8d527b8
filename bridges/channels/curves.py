"""P(target) over strengths: of an edit, and of every baseline that is added in the edit's place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.channels.baselines import at_last_token, dense_directions, last_token_batches, last_token_streams
from bridges.channels.prompts import Channels
from bridges.channels.runs import PromptRun, Prompts, edit_addend, edited_last_logits, unedited_last_logits
from bridges.io.progress import Bar
from bridges.models.residual import ResidualModel
from bridges.objective.pair import ModelPair
from bridges.steering.delta import EntryPoint, Streams, dense_addend, random_addends
from bridges.tasks.pairs import TaskPairs, probability

RANDOM_DIRECTIONS = 20
RESAMPLES = 1000
RESAMPLED_BYTES = 2**26
"""Memory for the resampled values of a band, at most."""
FEWEST_DIRECTIONS = 4
RANDOM_WORK = 5e12
"""Parameters times tokens times strengths that random directions may cost. In a large model they would take most of a
sweep's time, so that there are fewer, `FEWEST_DIRECTIONS` at least."""
OTHER_ADDENDS = 5
"""Addends besides random directions whose curve `edit_curves` measures."""


class Curve(NamedTuple):
    """P(target), one entry per strength."""

    mean: list[float]
    """Over prompts."""
    low: list[float]
    """Lower end of the 95 % interval of the mean (percentile bootstrap over prompts)."""
    high: list[float]
    """Upper end."""


def edit_curves(
    pair: ModelPair,
    chosen_on: Prompts,
    reported: Prompts,
    chosen: Channels,
    strengths: Sequence[float],
    bar: Bar | None = None,
) -> dict[str, Float[Tensor, "strengths prompts"]]:
    """P(target) of the reported prompts, for the edit and for everything that is added where the edit enters."""
    bridge, at = pair.bridge_set.index(chosen.site), chosen.at
    dense_site, sparse_site = pair.site("dense", bridge), pair.site("sparse", bridge)
    directions = dense_directions(pair, chosen_on, chosen)
    n_random = n_random_directions(pair.dense, reported, len(strengths))
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    for run in reported.runs([bridge]):
        of_run = {
            name: _mean_curve(pair.dense, run.dense, run.pairs, dense_site, addends, strengths, at, bar)
            for name, addends in dense_addends(pair, run, chosen, directions, n_random).items()
        }
        in_sparse = [edit_addend(pair, run, chosen, "sparse")]
        of_run["p_target_sparse_model"] = _mean_curve(
            pair.sparse, run.sparse, run.pairs, sparse_site, in_sparse, strengths, at, bar
        )
        for name, values in of_run.items():
            parts.setdefault(name, []).append((run.rows, values))
    return {name: reported.gather(of_batches) for name, of_batches in parts.items()}


def n_random_directions(model: ResidualModel, prompts: Prompts, n_strengths: int) -> int:
    """How many random directions a curve is the mean of."""
    n_parameters = sum(parameter.numel() for parameter in model.model.parameters())
    n_tokens = sum(batch.pairs.input_ids.numel() for batch in prompts.batches)
    affordable = int(RANDOM_WORK / (n_parameters * n_tokens * n_strengths))
    return min(RANDOM_DIRECTIONS, max(FEWEST_DIRECTIONS, affordable))


def mean_difference_curve(
    pair: ModelPair,
    reported: Prompts,
    site: int,
    vectors: Float[Tensor, "2 d"],
    strengths: Sequence[float],
    bar: Bar | None = None,
) -> Float[Tensor, "strengths prompts"]:
    """P(target) of the reported prompts with the dense model's own mean difference added at one of its sites.

    `site` and `vectors`: of `best_mean_difference`.
    """
    parts = []
    sites = {site, len(pair.dense.sites) - 1}
    for rows, pairs in last_token_batches(pair.dense, reported, len(sites)):
        streams = last_token_streams(pair.dense, pairs, sites)
        addend = at_last_token(vectors, pairs, streams)
        curve = p_target_curve(pair.dense, streams, pairs, site, addend, strengths, "residual")
        parts.append((rows, curve))
        if bar is not None:
            bar.advance(len(rows))
    return reported.gather(parts)


def dense_addends(
    pair: ModelPair,
    run: PromptRun,
    chosen: Channels,
    directions: tuple[Float[Tensor, "2 d_dense"], Float[Tensor, "2 d_dense"]],
    n_random: int = RANDOM_DIRECTIONS,
) -> dict[str, Iterable[Float[Tensor, "b s d_dense"]]]:
    """What each curve adds to the dense model where the edit enters, at strength 1; several addends are averaged over.

    `directions`: of `dense_directions`. Random directions, mean difference and probe have the edit's own norm at every
    token.
    """
    bridge = pair.bridge_set.index(chosen.site)
    edit = edit_addend(pair, run, chosen)
    norm = edit.norm(dim=-1, keepdim=True)
    mean_difference, probe = (one.to(edit)[run.pairs.direction.to(edit.device)][:, None] for one in directions)
    return {
        "p_target": [edit],
        "p_target_random_direction": random_addends(edit, n_random, seed=1),
        "p_target_mean_difference_equal_norm": [mean_difference * norm],
        "p_target_probe": [probe * norm],
        "p_target_all_channels": [dense_addend(pair, bridge, run.dz[bridge], chosen.at)],
    }


def _mean_curve(
    model: ResidualModel,
    streams: Streams,
    pairs: TaskPairs,
    site: int,
    addends: Iterable[Float[Tensor, "b s d"]],
    strengths: Sequence[float],
    at: EntryPoint,
    bar: Bar | None,
) -> Float[Tensor, "strengths b"]:
    """`p_target_curve`, mean over addends."""
    curves = []
    for addend in addends:
        curves.append(p_target_curve(model, streams, pairs, site, addend, strengths, at))
        if bar is not None:
            bar.advance(len(pairs))
    return torch.stack(curves).mean(0)


def p_target_curve(
    model: ResidualModel,
    streams: Streams,
    pairs: TaskPairs,
    site: int,
    addend: Float[Tensor, "b s d"],
    strengths: Sequence[float],
    at: EntryPoint,
) -> Float[Tensor, "strengths b"]:
    """P(target) of a batch's prompts at every strength of an addend; at strength 0 nothing runs but the head."""

    def logits(strength: float) -> Tensor:
        if strength == 0:
            return unedited_last_logits(model, streams)
        return edited_last_logits(model, streams, site, strength * addend, at)

    return torch.stack([probability(logits(strength), pairs.target_sets) for strength in strengths])


def with_band(values: Float[Tensor, "strengths prompts"]) -> Curve:
    """The mean over prompts, with its 95 % interval."""
    import numpy as np
    from scipy.stats import bootstrap

    rows = values.double().cpu().numpy()
    # The means are drawn a few at a time: all prompts of all strengths are copied for each.
    batch = max(1, min(RESAMPLES, RESAMPLED_BYTES // (rows.nbytes + rows[0].nbytes)))
    drawn = {"n_resamples": RESAMPLES, "batch": batch, "method": "percentile", "rng": np.random.default_rng(0)}
    low, high = bootstrap((rows,), np.mean, axis=1, **drawn).confidence_interval
    return Curve(rows.mean(1).tolist(), low.tolist(), high.tolist())
