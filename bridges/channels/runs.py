"""Counterfactual edits of channels on a task's prompts.

Everything that does not depend on the edit runs once per batch of prompts (`PromptRun`); of an edited pass only what
comes after its site runs, at the tokens from the first that a pair differs in, and the head on the last token alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.channels.batches import KEPT_BYTES, PairBatch, pair_batches
from bridges.channels.prompts import Channels
from bridges.io.progress import Bar
from bridges.models.residual import Context, ResidualModel
from bridges.models.tokens import check_tokens, check_vocabulary
from bridges.objective.pair import ModelPair, Side
from bridges.steering.delta import (
    Ending,
    EntryPoint,
    Streams,
    changed_reads_in,
    dense_addend,
    edited_ending,
    edited_logits,
    ending_logits,
    mask_channels,
    random_addends,
    sparse_delta,
    streams_in,
)
from bridges.tasks.pairs import TaskPairs, probability, solved


class PromptRun(NamedTuple):
    """The unedited passes of both models on a batch of prompts, and the changes that their edits are made of.

    Tensors [b, s, ...] are of the last s tokens: those before them are the same in both prompts of every pair.
    """

    rows: Int[Tensor, " b"]
    """Which of the task's pairs these are."""
    pairs: TaskPairs
    dense: Streams
    """At the sites of the bridges that were asked for, and at `final`."""
    sparse: Streams
    dn: dict[int, Float[Tensor, "b s d_sparse"]]
    """Per bridge the change of the sparse model's read from original to counterfactual prompt, in read units."""
    dz: dict[int, Float[Tensor, "b s d_sparse"]]
    """The same as a change of the sparse stream, at strength 1."""

    def side(self, side: Side) -> Streams:
        """The streams of one model."""
        return self.dense if side == "dense" else self.sparse

    def delta(self, bridge: int, at: EntryPoint) -> Float[Tensor, "b s d_sparse"]:
        """What the counterfactual edit of every channel adds to the sparse model's read or stream."""
        return (self.dz if at == "residual" else self.dn)[bridge]


class Prompts:
    """A task's pairs, and both models' unedited passes on them, batch by batch.

    Raises ValueError if prompts or answers hold tokens that a model does not know, or if prompts exceed a context.
    """

    def __init__(self, pair: ModelPair, pairs: TaskPairs):
        name = f"task={pairs.task!r} with this tokenizer"
        ids, other = (
            check_tokens(name, ids, pairs.attention_mask, pair.dense, pair.sparse, least=1)[0]
            for ids in (pairs.input_ids, pairs.counterfactual_ids)
        )
        pairs = pairs.replaced(input_ids=ids, counterfactual_ids=other)
        for sets in (pairs.answer_sets, pairs.target_sets):
            check_vocabulary(name, sets.distinct.clamp(min=0), pair.dense, pair.sparse)
        self.pair, self.pairs = pair, pairs.to(pair.dense.device)
        vocab_size = max(pair.dense.vocab_size, pair.sparse.vocab_size)
        everywhere = _bytes_per_token(pair, len(pair.bridge_set))
        prefixes = [prefix_bytes(model) for model in (pair.dense, pair.sparse)]
        self.splits_rows = all(prefixes)
        """Whether both models can run the tokens that a pair begins with once for all edits."""
        self._bytes_per_shared_token = sum(prefixes)
        shared = shared_tokens(self.pairs) if self.splits_rows else None
        self.batches: list[PairBatch] = pair_batches(self.pairs, everywhere, vocab_size, shared, sum(prefixes))
        self._kept: list[PromptRun] = []
        self._kept_bridges: set[int] = set()

    def __len__(self) -> int:
        return len(self.pairs)

    @torch.no_grad()
    def runs(self, bridges: Collection[int]) -> Iterator[PromptRun]:
        """Every batch's passes, with what edits at these bridges need; kept for the next time if they are small."""
        if self._kept and self._kept_bridges.issuperset(bridges):
            yield from self._kept
            return
        small = self._bytes(len(bridges)) <= KEPT_BYTES
        kept = []
        self._kept = []
        for batch in self.batches:
            run = _run(self.pair, batch, sorted(bridges), self.first_run(batch.pairs))
            if small:
                kept.append(run)
            yield run
            del run
        if small:
            self._kept, self._kept_bridges = kept, set(bridges)

    def forget(self) -> None:
        """Let go of the passes that are kept."""
        self._kept = []

    def _bytes(self, n_bridges: int) -> int:
        """Of the `PromptRun`s of all batches."""
        per_token, total = _bytes_per_token(self.pair, n_bridges), 0
        for _, pairs in self.batches:
            n, width = pairs.input_ids.shape
            first = self.first_run(pairs)
            total += n * ((width - first) * per_token + first * self._bytes_per_shared_token)
        return total

    def first_run(self, pairs: TaskPairs) -> int:
        """The first token of a batch that a `PromptRun` holds."""
        return int(shared_tokens(pairs).min()) if self.splits_rows else 0

    def gather(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, "*k n"]:
        """Values of batches, given with their rows, as one tensor in the order of the pairs."""
        rows = torch.cat([rows for rows, _ in parts])
        values = torch.cat([values for _, values in parts], -1)
        return values[..., rows.argsort().to(values.device)]


def _bytes_per_token(pair: ModelPair, n_bridges: int) -> int:
    """Of the streams, reads and changes in a `PromptRun`; the changes of the sparse stream are at least float32."""
    dense, sparse = ((n_bridges + 1) * model.d_model * model.dtype.itemsize for model in (pair.dense, pair.sparse))
    changes = (n_bridges + 1) * pair.sparse.d_model * max(pair.sparse.dtype.itemsize, 4)
    return dense + 2 * sparse + changes


def prefix_bytes(model: ResidualModel) -> int:
    """Of a token's keys and values in all layers; 0 where the model cannot run a prefix apart."""
    prefix = model.empty_prefix()
    if prefix is None:
        return 0
    with torch.no_grad():
        return model.run_prefix(prefix, torch.zeros(1, 1, dtype=torch.long, device=model.device)).bytes_per_token


def shared_tokens(pairs: TaskPairs) -> Int[Tensor, " n"]:
    """How many tokens the prompts of each pair begin with that are the same or padding; never the last one."""
    differ = (pairs.input_ids != pairs.counterfactual_ids) & pairs.attention_mask.bool()
    differ[:, -1] = True
    return differ.int().argmax(1)


def contexts_after(model: ResidualModel, first: int, pairs: TaskPairs, *rows: Int[Tensor, "b s"]) -> list[Context]:
    """A context for each of some prompts of the same pairs, of the tokens from `first` on.

    The tokens before, which are the same in all, run once.
    """
    mask = pairs.attention_mask.to(model.device)
    ids = [one.to(model.device) for one in rows]
    prefix = model.empty_prefix() if first else None
    if prefix is None:
        return [model.context(one, mask) for one in ids]
    prefix = model.run_prefix(prefix, ids[0][:, :first], mask[:, :first])
    return [model.context(one[:, first:], mask, prefix) for one in ids]


def _run(pair: ModelPair, batch: PairBatch, bridges: Sequence[int], first: int) -> PromptRun:
    pairs = batch.pairs

    def streams(side: Side, context: Context) -> Streams:
        model = pair.model(side)
        return streams_in(model, context, {*(pair.site(side, i) for i in bridges), len(model.sites) - 1})

    (dense,) = contexts_after(pair.dense, first, pairs, pairs.input_ids)
    contexts = contexts_after(pair.sparse, first, pairs, pairs.input_ids, pairs.counterfactual_ids)
    sites = [pair.site("sparse", i) for i in bridges]
    dn = dict(zip(bridges, changed_reads_in(pair.sparse, contexts, sites), strict=True))
    dz = {i: sparse_delta(pair, i, change) for i, change in dn.items()}
    return PromptRun(batch.rows, pairs, streams("dense", dense), streams("sparse", contexts[0]), dn, dz)


def last_token(ids: Int[Tensor, "b s"]) -> Int[Tensor, " 1"]:
    """The index of the last token, after which the answer stands."""
    return torch.tensor([ids.shape[1] - 1])


def unedited_last_logits(model: ResidualModel, streams: Streams) -> Float[Tensor, "b vocab"]:
    """The logits after the last token."""
    final = Ending(streams.residuals[len(model.sites) - 1])
    return ending_logits(model, final, streams.context, last_token(streams.context.input_ids))[:, 0]


def edited_last_logits(
    model: ResidualModel, streams: Streams, site: int, addend: Float[Tensor, "b s d"], at: EntryPoint
) -> Float[Tensor, "b vocab"]:
    """The logits after the last token with `addend` added at a site."""
    return edited_logits(model, streams, site, addend, at, last_token(streams.context.input_ids))[:, 0]


def edit_addend(pair: ModelPair, run: PromptRun, chosen: Channels, side: Side = "dense") -> Float[Tensor, "b s d"]:
    """What the counterfactual edit of the channels adds to one model's read or stream, at strength 1."""
    i = pair.bridge_set.index(chosen.site)
    if side == "sparse":
        return mask_channels(run.delta(i, chosen.at), chosen.channels)
    return dense_addend(pair, i, mask_channels(run.dz[i], chosen.channels), chosen.at)


def ending_under_edit(pair: ModelPair, run: PromptRun, chosen: Channels) -> Ending:
    """The dense model's pass under the counterfactual edit, up to the head."""
    site = pair.site("dense", pair.bridge_set.index(chosen.site))
    return edited_ending(pair.dense, run.dense, site, edit_addend(pair, run, chosen), chosen.at)


def logits_under_edit(
    pair: ModelPair, run: PromptRun, chosen: Channels, strength: float = 1.0, side: Side = "dense"
) -> Float[Tensor, "b vocab"]:
    """One model's logits after the last token of the original prompts, under the counterfactual edit."""
    site = pair.site(side, pair.bridge_set.index(chosen.site))
    addend = strength * edit_addend(pair, run, chosen, side)
    return edited_last_logits(pair.model(side), run.side(side), site, addend, chosen.at)


def p_target_unedited(pair: ModelPair, prompts: Prompts, side: Side = "dense") -> Float[Tensor, " n"]:
    """P(target) of every prompt without an edit."""
    model = pair.model(side)
    return prompts.gather(
        [
            (run.rows, probability(unedited_last_logits(model, run.side(side)), run.pairs.target_sets))
            for run in prompts.runs(())
        ]
    )


def part_solved(pair: ModelPair, prompts: Prompts, side: Side = "dense") -> float:
    """The part of the prompts whose answer an unedited model finds likelier than the target."""
    model = pair.model(side)
    right = sum(int(solved(unedited_last_logits(model, r.side(side)), r.pairs).sum()) for r in prompts.runs(()))
    return right / len(prompts)


def p_target_under_edits(
    pair: ModelPair,
    prompts: Prompts,
    edits: Sequence[Channels],
    side: Side = "dense",
    strength: float = 1.0,
    bar: Bar | None = None,
) -> Float[Tensor, "edits n"]:
    """P(target) of every prompt under each counterfactual edit; all edits run on one batch before the next."""
    parts = []
    for run in prompts.runs({pair.bridge_set.index(chosen.site) for chosen in edits}):
        of_batch = []
        for chosen in edits:
            logits = logits_under_edit(pair, run, chosen, strength, side)
            of_batch.append(probability(logits, run.pairs.target_sets))
            if bar is not None:
                bar.advance(len(run.rows))
        parts.append((run.rows, torch.stack(of_batch)))
    return prompts.gather(parts)


def p_target_under_edit(
    pair: ModelPair, prompts: Prompts, chosen: Channels, strength: float = 1.0, side: Side = "dense"
) -> Float[Tensor, " n"]:
    """P(target) of every prompt under the counterfactual edit of the channels."""
    return p_target_under_edits(pair, prompts, [chosen], side, strength)[0]


def p_target_under_random(
    pair: ModelPair, prompts: Prompts, chosen: Channels, n: int, seed: int
) -> Float[Tensor, "directions n"]:
    """P(target) of the dense model under `n` random directions with the edit's norm at every token."""
    bridge = pair.bridge_set.index(chosen.site)
    site, parts = pair.site("dense", bridge), []
    for run in prompts.runs([bridge]):
        addends = random_addends(edit_addend(pair, run, chosen), n, seed)
        logits = (edited_last_logits(pair.dense, run.dense, site, addend, chosen.at) for addend in addends)
        parts.append((run.rows, torch.stack([probability(one, run.pairs.target_sets) for one in logits])))
    return prompts.gather(parts)
