"""The dense model's own steering vectors, found without a bridge: what edits through the bridge are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.channels.prompts import Channels, Prompts, edit_addend, p_target
from bridges.models.residual import ResidualModel
from bridges.objective.hybrid import ModelPair
from bridges.steering.delta import EntryPoint, edited_logits
from bridges.tasks.pairs import TaskPairs

TOUCHED = 1e-3
"""A token counts as edited if its addend has at least this part of the largest addend's norm."""


def dense_directions(
    pair: ModelPair, prompts: Prompts, chosen: Channels
) -> tuple[Float[Tensor, "2 d_dense"], Float[Tensor, "2 d_dense"]]:
    """Unit directions of the dense model where an edit enters: of the mean difference, and of a linear probe.

    One row for each task order. Both come from the dense stream (or read) of original and counterfactual prompts, at
    the tokens that the edit changes; the probe is a logistic regression that separates the two.
    """
    pairs, site = prompts.pairs, pair.site("dense", pair.bridge_set.index(chosen.site))
    norm = edit_addend(pair, prompts, chosen).norm(dim=-1)
    edited = norm > TOUCHED * norm.max()
    original, counterfactual = (
        _activations(pair.dense, ids, pairs, site, chosen.at) for ids in (pairs.input_ids, pairs.counterfactual_ids)
    )
    differences, probes = [], []
    for direction in (0, 1):
        rows = edited & (pairs.direction == direction)[:, None]
        before, after = original[rows], counterfactual[rows]
        differences.append(_unit((after - before).sum(0)))
        probes.append(_unit(_probe(before, after)))
    return torch.stack(differences), torch.stack(probes)


def _activations(
    model: ResidualModel, ids: Tensor, pairs: TaskPairs, site: int, at: EntryPoint
) -> Float[Tensor, "b s d"]:
    """The stream or the read at a site."""
    if at == "residual":
        return model.trace(ids, pairs.attention_mask).residuals[site]
    return model.reads(ids, pairs.attention_mask)[site]


def _probe(before: Float[Tensor, "n d"], after: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The weights of a logistic regression that tells `after` from `before`, in their own units."""
    if not len(before):
        return before.new_zeros(before.shape[-1])
    from sklearn.linear_model import LogisticRegression

    features = torch.cat([before, after]).double().cpu().numpy()
    labels = [0] * len(before) + [1] * len(after)
    # Not StandardScaler: with it the figures of the demo's probe move by 0.1 %.
    scale = features.std(0) + 1e-12
    regression = LogisticRegression(max_iter=1000).fit(features / scale, labels)
    return torch.tensor(regression.coef_[0] / scale).to(before)


def _unit(vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    return vector / vector.norm().clamp(min=torch.finfo(vector.dtype).tiny)


def best_mean_difference(model: ResidualModel, prompts: Prompts) -> tuple[int, Callable[[TaskPairs], Tensor]]:
    """The dense model's mean-difference vectors at the last token, at the site where adding them does most.

    One vector for each task order. Returns the site, and a function from pairs to what is added to their stream
    there.
    """
    pairs, trace = prompts.pairs, prompts.traces.dense
    counterfactual = model.trace(pairs.counterfactual_ids, pairs.attention_mask).residuals

    def addend_at(site: int) -> Callable[[TaskPairs], Tensor]:
        difference = (counterfactual[site] - trace.residuals[site])[:, -1]
        vectors = torch.stack([difference[pairs.direction == direction].mean(0) for direction in (0, 1)])

        def addend(to: TaskPairs) -> Float[Tensor, "b s d"]:
            values = vectors.new_zeros(*to.input_ids.shape, vectors.shape[-1])
            values[:, -1] = vectors[to.direction]
            return values

        return addend

    def mean_p_target(site: int) -> float:
        logits = edited_logits(model, trace, site, addend_at(site)(pairs), "residual")
        return p_target(logits, pairs).mean().item()

    best = max(range(len(model.sites)), key=mean_p_target)
    return best, addend_at(best)
