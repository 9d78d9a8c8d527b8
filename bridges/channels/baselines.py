"""The dense model's own directions, without a bridge: mean differences and probes, which edits are measured beside."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from bridges.channels.prompts import Channels, Prompts, addend_of, p_target
from bridges.models.residual import ResidualModel
from bridges.objective.hybrid import ModelPair
from bridges.steering.delta import EntryPoint, edited_logits
from bridges.tasks.pairs import TaskPairs


def dense_directions(
    pair: ModelPair, prompts: Prompts, chosen: Channels
) -> tuple[Float[Tensor, "2 d_dense"], Float[Tensor, "2 d_dense"]]:
    """The dense model's own unit directions where the edit enters, one per way round: mean difference, and a probe's.

    Both from the dense stream (or read) of presented and counterfactual prompts at the tokens that the edit touches;
    the probe is a logistic regression that tells the two apart.
    """
    pairs, site = prompts.pairs, pair.site("dense", pair.bridge_set.index(chosen.site))
    touched = addend_of(pair, prompts, chosen).norm(dim=-1)
    touched = touched > 1e-3 * touched.max()
    shown, other = (
        _entering(pair.dense, ids, pairs, site, chosen.at) for ids in (pairs.input_ids, pairs.counterfactual_ids)
    )
    differences, probes = [], []
    for side in (0, 1):
        here = touched & (pairs.direction == side)[:, None]
        before, after = shown[here], other[here]
        differences.append(_unit((after - before).sum(0)))
        probes.append(_unit(_probe(before, after)))
    return torch.stack(differences), torch.stack(probes)


def _entering(model: ResidualModel, ids: Tensor, pairs: TaskPairs, site: int, at: EntryPoint) -> Float[Tensor, "b s d"]:
    if at == "residual":
        return model.trace(ids, pairs.attention_mask).residuals[site]
    return model.reads(ids, pairs.attention_mask)[site]


def _probe(before: Float[Tensor, "n d"], after: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    if not len(before):
        return before.new_zeros(before.shape[-1])
    features = torch.cat([before, after]).double().cpu().numpy()
    labels = np.repeat([0, 1], [len(before), len(after)])
    scale = features.std(0) + 1e-12
    probe = LogisticRegression(max_iter=1000).fit(features / scale, labels)
    return torch.tensor(probe.coef_[0] / scale).to(before)


def _unit(vector: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    return vector / vector.norm().clamp(min=torch.finfo(vector.dtype).tiny)


def mean_difference(model: ResidualModel, prompts: Prompts) -> tuple[int, Callable[[TaskPairs], Tensor]]:
    """The dense model's own steering vector: the mean difference at the last token, at the site where it does most.

    One vector per way round. Returns the site and what to add to the stream of given pairs.
    """
    pairs, trace = prompts.pairs, prompts.traces.dense
    swapped = model.trace(pairs.counterfactual_ids, pairs.attention_mask).residuals

    def adder(site: int) -> Callable[[TaskPairs], Tensor]:
        last = (swapped[site] - trace.residuals[site])[:, -1]
        vectors = torch.stack([last[pairs.direction == side].mean(0) for side in (0, 1)])

        def add(to: TaskPairs) -> Tensor:
            values = last.new_zeros(*to.input_ids.shape, last.shape[-1])
            values[:, -1] = vectors[to.direction]
            return values

        return add

    def effect(site: int) -> float:
        return p_target(edited_logits(model, trace, site, adder(site)(pairs), "residual"), pairs).mean().item()

    best = max(range(len(model.sites)), key=effect)
    return best, adder(best)
