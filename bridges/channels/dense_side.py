"""What a channel of the sparse stream is in the dense model: the encoder's reading, and what its column does there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.channels.baselines import mean_difference
from bridges.channels.batches import row_batches
from bridges.channels.from_circuit import stream_site
from bridges.channels.prompts import Channels
from bridges.channels.reference_text import kl_sum, logit_chunks, unedited_ending
from bridges.channels.runs import Prompts
from bridges.circuits.feature_view import DenseSide
from bridges.circuits.nodes import Node
from bridges.io.progress import Bar
from bridges.objective.pair import ModelPair
from bridges.ops.kl import kl_divergence
from bridges.steering.delta import (
    at_least_float32,
    dense_addend,
    edited_ending,
    random_addends,
    run_streams,
    sparse_delta,
)
from bridges.tasks.pairs import TaskPairs

DENSE_TOKENS = 2048
"""Tokens of the text that changes of logits and KLs are means over, at most."""
QUANTILE = 0.99
"""Of a node's absolute values where it is not zero: what is added to its channel."""
TOP = 10
"""Tokens whose logits rise most, and fall most."""
N_RANDOM = 4
"""Random directions of the addend's norm."""


class BridgedNode(NamedTuple):
    """A node that is a channel of a bridged stream."""

    name: Node
    site: str
    """The sparse site of the bridge."""

    @property
    def is_read(self) -> bool:
        """Whether its values are in read units; a write's are in those of the stream."""
        return self.name.place.endswith("read")


def find_bridged(node: Node, pair: ModelPair) -> BridgedNode | str:
    """The node at the bridged site whose stream it is a channel of, or a sentence that says why there is none.

    A read is a channel of the stream at its own site, a write of the stream at the first bridged site after it. Raises
    ValueError if the bridge's units are not measured.
    """
    sites, bridged = pair.sparse.sites, pair.bridge_set.sites
    site = stream_site(node.place, len(sites) // 2)
    if site is None or node.index >= pair.sparse.d_model:
        return f"{node} is no channel of the residual stream"
    if node.place.endswith("write"):
        site = next((str(one) for one in sites[pair.sparse.index(site) :] if one in bridged), site)
    if site not in bridged:
        return f"there is no bridge at {site}, only at {', '.join(bridged)}"
    bridge = pair.bridge_set[site]
    if bridge.rms_sparse.isnan() or bridge.gain_sparse[node.index].isnan():
        raise ValueError(
            f"site={site!r}: rms and gain of its bridge are not measured (they are NaN); use bridges "
            "that fit() returned"
        )
    return BridgedNode(node, site)


def encoder_readings(
    pair: ModelPair, node: BridgedNode, rows: Int[Tensor, "rows seq"], bar: Bar
) -> Float[Tensor, "rows seq"]:
    """What the encoder reads in the dense model for a node at every token, in the node's units, float64.

    For a read v = gain_s z / R_s with z = f(h), for a write z (method, section 4).
    """
    i = pair.bridge_set.index(node.site)
    bridge, site, channel = pair.bridge_set[i], pair.site("dense", i), node.name.index
    unit = (bridge.gain_sparse[channel].double() / bridge.rms_sparse.double()).cpu() if node.is_read else 1.0
    found = []
    for ids in row_batches(rows):
        h = run_streams(pair.dense, ids.to(pair.dense.device), None, [site]).residuals[site]
        z = bridge.encode_at(h.to(bridge.encoder_weight.device), [channel])[..., 0]
        found.append(z.double().cpu() * unit)
        bar.advance(ids.numel())
    return torch.cat(found)


def measure_dense_side(
    pair: ModelPair,
    node: BridgedNode,
    rows: Int[Tensor, "rows seq"],
    values: Float[Tensor, "rows seq"],
    readings: Float[Tensor, "rows seq"],
    names: list[str],
    task: TaskPairs | None,
    seed: int,
    bar: Bar,
) -> DenseSide:
    """A node's dense side, from its `values` on text and the encoder's `readings` there.

    `names`: the text of every token of the dense model; `seed` of the random directions.
    """
    i = pair.bridge_set.index(node.site)
    active = values[values != 0].abs().double()
    added = active.quantile(QUANTILE).item() if len(active) else 0.0
    used = effect_rows(rows)
    change, kl, kl_random = _effect(pair, node, added, used, seed, bar)
    return DenseSide(
        site=node.site,
        dense_site=pair.bridge_set.site_pairs[i][0],
        channel=node.name.index,
        encoder_correlation=_correlation(values, readings),
        both_active=((values != 0) & (readings != 0)).double().mean().item(),
        either_active=((values != 0) | (readings != 0)).double().mean().item(),
        added=added,
        tokens=used.numel(),
        raised=_largest(change, names, 1),
        lowered=_largest(change, names, -1),
        kl=kl,
        kl_random=kl_random,
        task=None if task is None else task.task,
        mean_difference=None if task is None else _cosine_with_mean_difference(pair, node, task),
    )


def effect_rows(rows: Int[Tensor, "rows seq"]) -> Int[Tensor, "used seq"]:
    """The rows that changes of logits and KLs are measured on: the first ones, of `DENSE_TOKENS` tokens at most."""
    return rows[: max(1, DENSE_TOKENS // rows.shape[1])]


def _addend(pair: ModelPair, node: BridgedNode, added: float) -> Float[Tensor, " d_dense"]:
    """What a change of the node by `added` adds to the dense stream."""
    i = pair.bridge_set.index(node.site)
    bridge = pair.bridge_set[i]
    wide = torch.promote_types(bridge.encoder_weight.dtype, torch.float32)
    change = torch.zeros(pair.sparse.d_model, dtype=wide, device=bridge.encoder_weight.device)
    change[node.name.index] = added
    return dense_addend(pair, i, sparse_delta(pair, i, change) if node.is_read else change, "residual")


def _effect(
    pair: ModelPair, node: BridgedNode, added: float, rows: Int[Tensor, "rows seq"], seed: int, bar: Bar
) -> tuple[Float[Tensor, " vocab"], float, float]:
    """The mean change of every logit, the KL from the unedited model, and that of random directions, per token."""
    if not added:  # passes that are equal have a KL of 0 up to rounding only
        return torch.zeros(pair.dense.vocab_size, dtype=torch.float64), 0.0, 0.0
    model, site = pair.dense, pair.site("dense", pair.bridge_set.index(node.site))
    addend = _addend(pair, node, added)
    change, kl, kl_random = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    for ids in row_batches(rows):
        streams = run_streams(model, ids.to(model.device), None, {site, len(model.sites) - 1})
        everywhere = addend.expand(*ids.shape, -1)
        passes = [unedited_ending(model, streams), edited_ending(model, streams, site, everywhere, "residual")]
        for _, (unedited, edited) in logit_chunks(model, streams, passes):
            change = change + (at_least_float32(edited) - unedited).sum((0, 1), dtype=torch.float64).cpu()
            kl += kl_divergence(unedited.flatten(0, 1), edited.flatten(0, 1)).item()
        bar.advance(ids.numel())
        for one in random_addends(everywhere, N_RANDOM, seed):
            ending = edited_ending(model, streams, site, one, "residual")
            kl_random += kl_sum(model, streams, ending) / N_RANDOM
            bar.advance(ids.numel())
    return change / rows.numel(), kl / rows.numel(), kl_random / rows.numel()


def _largest(change: Float[Tensor, " vocab"], names: list[str], sign: int) -> list[tuple[str, float]]:
    """The tokens of largest sign * change, if that is over 0."""
    signed = (sign * change)[: len(names)]
    top = signed.topk(min(TOP, len(signed)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [(names[token], sign * value) for token, value in pairs if value > 0]


def _correlation(x: Float[Tensor, "rows seq"], y: Float[Tensor, "rows seq"]) -> float | None:
    """Pearson's correlation over all tokens; None where one of both is constant."""
    if x.min() == x.max() or y.min() == y.max():
        return None
    x, y = (one.double().flatten() - one.double().mean() for one in (x, y))
    return (x @ y / (x.norm() * y.norm())).item()


def _cosine_with_mean_difference(pair: ModelPair, node: BridgedNode, task: TaskPairs) -> float | None:
    """Of the decoder's column, see `DenseSide.mean_difference`."""
    chosen = Channels(node.site, (node.name.index,), "residual")
    direction = mean_difference(pair, Prompts(pair, task), chosen).double().cpu()
    column = pair.bridge_set[node.site].decoder_weight[:, node.name.index].detach().double().cpu()
    norms = column.norm() * direction.norm()
    return (column @ direction / norms).item() if norms > 0 else None
