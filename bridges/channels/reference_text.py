"""Text that has nothing to do with a task: sampled where none is given; and what ablating channels does to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.channels.batches import KEPT_BYTES, row_batches, token_chunks
from bridges.channels.prompts import Channels
from bridges.config import DEFAULT_SEQ_LEN
from bridges.data.prepare import saved_tokenizers
from bridges.data.sampled import SharedTokens, sampled_text
from bridges.models.pairing import one_sided_tokens
from bridges.models.residual import ResidualModel, context_limit
from bridges.objective.pair import ModelPair
from bridges.ops.kl import kl_divergence
from bridges.steering.delta import (
    Ending,
    Streams,
    dense_addend,
    edited_ending,
    ending_logits,
    run_streams,
    sparse_delta,
)

SAMPLED_ROWS = 16
"""Rows sampled from the dense model where no text is given."""


class AblationRun(NamedTuple):
    """The dense model's unedited pass on a batch of text, and the change that ablations are made of."""

    dense: Streams
    """At the sites of the bridges that channels are ablated at, and at `final`."""
    delta: dict[int, Float[Tensor, "b s channels"]]
    """Per bridge the change of the sparse stream that brings the reads of its channels to 0."""


def sample_text(
    pair: ModelPair, seed: int, for_search: bool = True, sources: tuple[Any, Any] | None = None
) -> Int[Tensor, "rows seq"]:
    """Sample reference text from the dense model: other rows for a search than for what is reported of its result.

    `sources`: the dense and the sparse model as the user named them, which says where their tokenizers are saved; the
    text holds no token that only one of these has.
    """
    width = min(DEFAULT_SEQ_LEN, context_limit(pair.dense, pair.sparse) or DEFAULT_SEQ_LEN)
    one_sided = {} if sources is None else one_sided_tokens(saved_tokenizers(sources))
    shared = SharedTokens(min(pair.dense.vocab_size, pair.sparse.vocab_size), frozenset(one_sided))
    return sampled_text(pair.dense, SAMPLED_ROWS, width, 2 * seed + for_search, shared)


class ReferenceText:
    """Text that ablations are measured on, `channels` per bridge at the most."""

    def __init__(self, pair: ModelPair, input_ids: Int[Tensor, "rows seq"], channels: Mapping[int, Sequence[int]]):
        self.pair, self.input_ids = pair, input_ids
        self.channels = {i: list(listed) for i, listed in channels.items() if len(listed)}
        self._kept: dict[int, list[AblationRun]] = {}

    @torch.no_grad()
    def ablation_kl(self, chosen: Channels) -> float:
        """KL of the dense model with the channels ablated from the unedited one, nats per token."""
        i = self.pair.bridge_set.index(chosen.site)
        total = 0.0
        for run in self._runs(i):
            ablated = ablated_ending(self.pair, run, chosen, self.channels[i])
            total += kl_sum(self.pair.dense, run.dense, ablated)
        return total / self.input_ids.numel()

    def _runs(self, bridge: int) -> Iterator[AblationRun]:
        """Every batch's passes for ablations at one bridge, kept for the next time if all that are kept are small.

        Most searches ablate at a few of many sites.
        """
        if bridge in self._kept:
            yield from self._kept[bridge]
            return
        small = (len(self._kept) + 1) * self._bytes() <= KEPT_BYTES
        kept = []
        for ids in row_batches(self.input_ids):
            run = ablation_run(self.pair, ids, None, {bridge: self.channels[bridge]})
            if small:
                kept.append(run)
            yield run
        if small:
            self._kept[bridge] = kept

    def _bytes(self) -> int:
        """Of the dense streams at the embedding, at one site and at `final`, and of the changes of some channels."""
        dense, most = self.pair.dense, max(map(len, self.channels.values()))
        changes = most * max(self.pair.sparse.dtype.itemsize, 4)
        return self.input_ids.numel() * (3 * dense.d_model * dense.dtype.itemsize + changes)


def ablation_run(
    pair: ModelPair,
    input_ids: Int[Tensor, "b s"],
    attention_mask: Int[Tensor, "b s"] | None,
    channels: Mapping[int, Sequence[int]],
) -> AblationRun:
    """Run both models on text at whose bridged sites these channels are to be ablated."""

    def inputs(model: ResidualModel) -> tuple[Tensor, Tensor | None]:
        mask = attention_mask if attention_mask is None else attention_mask.to(model.device)
        return input_ids.to(model.device), mask

    bridges = sorted(channels)
    reads = pair.sparse.reads(*inputs(pair.sparse), [pair.site("sparse", i) for i in bridges])
    # A copy, so that the reads of the other channels are not kept with it.
    delta = {
        i: sparse_delta(pair, i, -read)[..., list(channels[i])].clone() for i, read in zip(bridges, reads, strict=True)
    }
    sites = {*(pair.site("dense", i) for i in bridges), len(pair.dense.sites) - 1}
    return AblationRun(run_streams(pair.dense, *inputs(pair.dense), sites), delta)


def ablated_ending(pair: ModelPair, run: AblationRun, chosen: Channels, known: Sequence[int]) -> Ending:
    """The dense model's pass with channels ablated, up to the head: their reads are 0 at every position.

    `known`: the channels that `run.delta` holds at this site.
    """
    i, delta = pair.bridge_set.index(chosen.site), run.delta
    columns = [list(known).index(channel) for channel in chosen.channels]
    dz = delta[i].new_zeros(*delta[i].shape[:-1], pair.sparse.d_model)
    dz[..., list(chosen.channels)] = delta[i][..., columns]
    addend = dense_addend(pair, i, dz, chosen.at)
    return edited_ending(pair.dense, run.dense, pair.site("dense", i), addend, chosen.at)


def kl_sum(model: ResidualModel, streams: Streams, edited: Ending, counted: Bool[Tensor, "b s"] | None = None) -> float:
    """The sum over tokens of KL(unedited || edited), nats, over the whole vocabulary, a few tokens at a time.

    `counted`: which tokens; None: all. `streams` are the unedited pass, at `final` at least.
    """
    total = 0.0
    for tokens, (unedited, logits) in logit_chunks(model, streams, [unedited_ending(model, streams), edited]):
        if counted is None:  # no copy of the logits
            unedited, logits = unedited.flatten(0, 1), logits.flatten(0, 1)
        else:
            unedited, logits = unedited[counted[:, tokens]], logits[counted[:, tokens]]
        total += kl_divergence(unedited, logits).item()
    return total


def unedited_ending(model: ResidualModel, streams: Streams) -> Ending:
    """The unedited pass up to the head."""
    return Ending(streams.residuals[len(model.sites) - 1])


def logit_chunks(
    model: ResidualModel, streams: Streams, endings: Sequence[Ending]
) -> Iterator[tuple[Int[Tensor, " kept"], list[Float[Tensor, "b kept vocab"]]]]:
    """The logits of several passes at every token, a few tokens at a time, with the indices of these."""
    context = streams.context
    n_rows, n_tokens = context.input_ids.shape
    for tokens in token_chunks(n_rows, n_tokens, model.vocab_size):
        yield tokens, [ending_logits(model, ending, context, tokens) for ending in endings]
