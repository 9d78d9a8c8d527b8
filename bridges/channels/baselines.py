"""The dense model's own steering vectors, found without a bridge: what edits through the bridge are compared with."""

from __future__ import annotations

from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.channels.batches import PairBatch, pair_batches
from bridges.channels.prompts import Channels
from bridges.channels.runs import Prompts, contexts_after, edit_addend, edited_last_logits, prefix_bytes
from bridges.io.progress import Bar
from bridges.models.residual import Context, ResidualModel
from bridges.objective.pair import ModelPair
from bridges.steering.delta import EntryPoint, Streams, run_streams, streams_in
from bridges.tasks.pairs import TaskPairs, probability

TOUCHED = 1e-3
"""A token counts as edited if its addend has at least this part of the largest addend's norm."""


def dense_directions(
    pair: ModelPair, prompts: Prompts, chosen: Channels
) -> tuple[Float[Tensor, "2 d_dense"], Float[Tensor, "2 d_dense"]]:
    """Unit directions of the dense model where an edit enters: of the mean difference, and of a linear probe.

    One row for each task order. Both come from the dense stream (or read) of original and counterfactual prompts, at
    the tokens that the edit changes; the probe is a logistic regression that separates the two.
    """
    edited = _edited_activations(pair, prompts, chosen)
    differences = [_unit((after - before).sum(0)) for before, after in edited]
    probes = [_unit(_probe(before, after)) for before, after in edited]
    return torch.stack(differences), torch.stack(probes)


def mean_difference(pair: ModelPair, prompts: Prompts, chosen: Channels) -> Float[Tensor, " d_dense"]:
    """The dense model's mean difference where an edit enters, towards the task's second prompt, as a unit direction.

    The mean is over the tokens that the edit changes, in pairs of both task orders; zeros where it changes none.
    """
    (first, second), (later, earlier) = _edited_activations(pair, prompts, chosen)
    return _unit((second - first).sum(0) + (later - earlier).sum(0))


def _edited_activations(
    pair: ModelPair, prompts: Prompts, chosen: Channels
) -> list[tuple[Float[Tensor, "n d_dense"], Float[Tensor, "n d_dense"]]]:
    """Per task order the dense stream (or read) at the tokens that an edit changes: of original prompts, of the others.

    Rows of one task order follow each other as the pairs do.
    """
    bridge = pair.bridge_set.index(chosen.site)
    site, runs = pair.site("dense", bridge), prompts.runs
    largest = max(edit_addend(pair, run, chosen).norm(dim=-1).max().item() for run in runs([bridge]))
    found: dict[int, tuple[Tensor, Tensor]] = {}  # per pair the activations at its edited tokens, on both prompts
    for run in runs([bridge]):
        original, counterfactual = (
            _activations(pair.dense, context, site, chosen.at)
            for context in contexts_after(
                pair.dense,
                prompts.first_run(run.pairs),
                run.pairs,
                run.pairs.input_ids,
                run.pairs.counterfactual_ids,
            )
        )
        edited = edit_addend(pair, run, chosen).norm(dim=-1) > TOUCHED * largest
        for row, one, before, after in zip(run.rows.tolist(), edited, original, counterfactual, strict=True):
            found[row] = before[one], after[one]
    nothing = torch.zeros(0, pair.dense.d_model, dtype=pair.dense.dtype, device=pair.dense.device)
    activations = []
    for direction in (0, 1):
        rows = (prompts.pairs.direction == direction).nonzero().flatten().tolist()
        before, after = (torch.cat([nothing, *(found[row][k] for row in rows)]) for k in (0, 1))
        activations.append((before, after))
    return activations


def _activations(model: ResidualModel, context: Context, site: int, at: EntryPoint) -> Float[Tensor, "b s d"]:
    """The stream or the read at a site."""
    if at == "residual":
        return streams_in(model, context, [site]).residuals[site]
    return model.reads_in(context, [site])[0]


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


def best_mean_difference(
    model: ResidualModel, prompts: Prompts, bar: Bar | None = None
) -> tuple[int, Float[Tensor, "2 d"]]:
    """The dense model's mean-difference vectors at the last token, at the site where adding them does most.

    Returns the site, and one vector for each task order, which `at_last_token` adds.
    """
    vectors = _mean_differences(model, prompts)
    total = torch.zeros(len(model.sites), dtype=torch.float64)
    for batch in last_token_batches(model, prompts, len(model.sites)):
        streams = last_token_streams(model, batch.pairs, range(len(model.sites)))
        for site, vector in enumerate(vectors):
            addend = at_last_token(vector, batch.pairs, streams)
            logits = edited_last_logits(model, streams, site, addend, "residual")
            total[site] += probability(logits, batch.pairs.target_sets).sum().item()
            if bar is not None:
                bar.advance(len(batch.rows))
    best = int(total.argmax())
    return best, vectors[best]


def _mean_differences(model: ResidualModel, prompts: Prompts) -> Float[Tensor, "sites 2 d"]:
    """Per site and task order, the mean difference of the stream at the last token, counterfactual less original."""
    sums = torch.zeros(len(model.sites), 2, model.d_model, dtype=torch.float64, device=model.device)
    for _, pairs in prompts.batches:
        sites = range(len(model.sites))
        ids, other = (pairs.input_ids, pairs.counterfactual_ids)
        original, counterfactual = (run_streams(model, one, pairs.attention_mask, sites) for one in (ids, other))
        for site in sites:
            difference = (counterfactual.residuals[site] - original.residuals[site])[:, -1].double()
            sums[site].index_add_(0, pairs.direction.to(sums.device), difference.to(sums.device))
    counts = torch.bincount(prompts.pairs.direction, minlength=2).to(sums)
    return (sums / counts[:, None]).to(model.dtype)


def last_token_batches(model: ResidualModel, prompts: Prompts, n_sites: int) -> list[PairBatch]:
    """Batches for passes that run the last token alone: many pairs, since a matrix takes few tokens no faster.

    `n_sites`: how many sites' streams such a pass keeps.
    """
    per_shared_token = prefix_bytes(model)
    if not per_shared_token:
        return prompts.batches
    width = prompts.pairs.input_ids.shape[1]
    shared = torch.full((len(prompts),), width - 1)
    per_token = n_sites * model.d_model * model.dtype.itemsize
    return pair_batches(prompts.pairs, per_token, model.vocab_size, shared, per_shared_token)


def last_token_streams(model: ResidualModel, pairs: TaskPairs, sites: Collection[int]) -> Streams:
    """The unedited pass on original prompts, of the last token alone where the model can run the others once."""
    (context,) = contexts_after(model, pairs.input_ids.shape[1] - 1, pairs, pairs.input_ids)
    return streams_in(model, context, sites)


def at_last_token(vectors: Float[Tensor, "2 d"], pairs: TaskPairs, streams: Streams) -> Float[Tensor, "b s d"]:
    """Each prompt's vector, by its task order, at its last token; 0 at the other tokens of the streams."""
    values = vectors.new_zeros(*streams.context.input_ids.shape, vectors.shape[-1])
    values[:, -1] = vectors[pairs.direction.to(vectors.device)]
    return values
