"""What an edit does where it should do nothing: on other text, on other tasks, and before the answer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from bridges.channels.batches import pair_batches, row_batches
from bridges.channels.constant_edits import constant_changes
from bridges.channels.prompts import Channels
from bridges.channels.reference_text import (
    AblationRun,
    ablated_ending,
    ablation_run,
    kl_sum,
    logit_chunks,
    unedited_ending,
)
from bridges.channels.runs import Prompts, ending_under_edit, last_token, unedited_last_logits
from bridges.io.progress import Bar
from bridges.objective.pair import ModelPair
from bridges.ops.kl import kl_divergence
from bridges.steering.delta import dense_addend, edited_ending, ending_logits
from bridges.tasks.pairs import MAX_TOKENS, TASKS, TaskPairs, probability, solved, task_pairs

PAIRS_PER_OTHER_TASK = 16
"""Pairs of each other task that side effects are measured on."""


class SideEffects(NamedTuple):
    """What two edits that need no counterfactual prompt do to text that has nothing to do with the task.

    They are made at every position: the channels ablated ("off"), and each channel's mean change added ("added").
    """

    kl: float
    """KL of the dense model with the channels ablated from the unedited one, nats per token."""
    ce_change: float
    """The change of next-token cross-entropy with them ablated, nats."""
    p_target_off: float
    """P(target) with the channels ablated, on the task's prompts of one order: the order with the larger P(target)."""
    kl_added: float
    """KL with each channel's mean change added."""
    kl_before_answer: float
    """KL of the counterfactual edit on the task's own prompts, over the tokens before the last."""
    tokens: int
    kl_other_tasks: float | None = None
    """KL at the answers of other tasks' prompts with the channels ablated."""
    solved_other_tasks: tuple[float, float] | None = None
    """Part of those prompts that the dense model solves, unedited and with the channels ablated."""

    def __str__(self) -> str:
        others = ""
        if self.kl_other_tasks is not None and self.solved_other_tasks is not None:
            before, after = self.solved_other_tasks
            others = f", at other tasks' answers {self.kl_other_tasks:.3f} (solved {before:.0%} -> {after:.0%})"
        return (
            f"side effects on {self.tokens} tokens of other text: channels off everywhere, KL {self.kl:.3f} nats, "
            f"cross-entropy {self.ce_change:+.3f}, P(target) {self.p_target_off:.3f} (max over both task orders)"
            f"{others}; the change added everywhere, KL {self.kl_added:.3f}; the edit itself, on the prompts before "
            f"the answer, KL {self.kl_before_answer:.3f}"
        )


@torch.no_grad()
def side_effects(
    pair: ModelPair,
    prompts: Prompts,
    chosen: Channels,
    text: Int[Tensor, "rows seq"],
    other_pairs: Sequence[TaskPairs] = (),
    bar: Bar | None = None,
) -> SideEffects:
    """Measure the side effects of channels on `text`, on the task's own prompts and on pairs of other tasks.

    `kl_added` is the mean over both task orders.
    """
    kl, kl_added, ce_change = _on_text(pair, prompts, chosen, text, bar)
    effects = SideEffects(
        kl=kl,
        ce_change=ce_change,
        p_target_off=_p_target_ablated(pair, prompts, chosen),
        kl_added=kl_added,
        kl_before_answer=_kl_before_answer(pair, prompts, chosen),
        tokens=text.numel(),
    )
    return effects._replace(**_on_other_tasks(pair, chosen, other_pairs, bar)) if other_pairs else effects


def _on_text(
    pair: ModelPair, prompts: Prompts, chosen: Channels, text: Int[Tensor, "rows seq"], bar: Bar | None
) -> tuple[float, float, float]:
    """KL with the channels ablated and with their mean change added, and the change of cross-entropy, per token."""
    i = pair.bridge_set.index(chosen.site)
    site, model = pair.site("dense", i), pair.dense
    addends = [dense_addend(pair, i, dz, chosen.at) for dz in constant_changes(prompts, i, chosen.channels)]
    kl, kl_added, ce = 0.0, 0.0, 0.0
    for ids in row_batches(text):
        run = ablation_run(pair, ids, None, {i: chosen.channels})
        ablated = ablated_ending(pair, run, chosen, chosen.channels)
        added = [edited_ending(model, run.dense, site, one.expand(*ids.shape, -1), chosen.at) for one in addends]
        endings = [unedited_ending(model, run.dense), ablated, *added]
        for tokens, (unedited, off, *ons) in logit_chunks(model, run.dense, endings):
            kl += _kl_sum(unedited, off)
            kl_added += sum(_kl_sum(unedited, on) for on in ons) / len(ons)
            ce += _cross_entropy_sum(off, ids, tokens) - _cross_entropy_sum(unedited, ids, tokens)
        if bar is not None:
            bar.advance(len(ids))
    return kl / text.numel(), kl_added / text.numel(), ce / (text.numel() - len(text))


def other_tasks(task: str, tokenizer: Any, max_tokens: int | None = None) -> list[TaskPairs]:
    """Make a few pairs of every task but one, with at most `max_tokens` tokens.

    Warns of each task that the tokenizer or that length does not allow.
    """
    limit = MAX_TOKENS if max_tokens is None else min(max_tokens, MAX_TOKENS)
    found = []
    for other in TASKS:
        if other != task:
            try:
                found.append(task_pairs(other, tokenizer, PAIRS_PER_OTHER_TASK, max_tokens=limit))
            except ValueError as error:
                warnings.warn(f"side effects leave out the task {other!r}: {error}", stacklevel=2)
    return found


def _on_other_tasks(
    pair: ModelPair, chosen: Channels, other_pairs: Sequence[TaskPairs], bar: Bar | None
) -> dict[str, Any]:
    kl, before, after, count = 0.0, 0, 0, 0
    for task in (one.to(pair.dense.device) for one in other_pairs):
        for _, pairs in pair_batches(task, 1, pair.dense.vocab_size):
            run = _ablation_run(pair, chosen, pairs)
            unedited, ablated = unedited_last_logits(pair.dense, run.dense), _ablated_last_logits(pair, run, chosen)
            kl += kl_divergence(unedited, ablated).item()
            before += int(solved(unedited, pairs).sum())
            after += int(solved(ablated, pairs).sum())
            count += len(pairs)
        if bar is not None:
            bar.advance(len(task))
    return {"kl_other_tasks": kl / count, "solved_other_tasks": (before / count, after / count)}


def _ablation_run(pair: ModelPair, chosen: Channels, pairs: TaskPairs) -> AblationRun:
    channels = {pair.bridge_set.index(chosen.site): chosen.channels}
    return ablation_run(pair, pairs.input_ids, pairs.attention_mask, channels)


def _ablated_last_logits(pair: ModelPair, run: AblationRun, chosen: Channels) -> Float[Tensor, "b vocab"]:
    """The dense model's logits after the last token, with the channels ablated."""
    ending, context = ablated_ending(pair, run, chosen, chosen.channels), run.dense.context
    return ending_logits(pair.dense, ending, context, last_token(context.input_ids))[:, 0]


def _p_target_ablated(pair: ModelPair, prompts: Prompts, chosen: Channels) -> float:
    """The mean over the prompts of one task order, the larger of the two."""
    parts = []
    for rows, pairs in prompts.batches:
        logits = _ablated_last_logits(pair, _ablation_run(pair, chosen, pairs), chosen)
        parts.append((rows, probability(logits, pairs.target_sets)))
    p = prompts.gather(parts)
    by_direction = [p[prompts.pairs.direction.to(p.device) == direction] for direction in (0, 1)]
    return max(one.mean().item() for one in by_direction if len(one))


def _kl_before_answer(pair: ModelPair, prompts: Prompts, chosen: Channels) -> float:
    """The edit is not meant to change what follows any token but the last."""
    total, count = 0.0, 0
    for run in prompts.runs([pair.bridge_set.index(chosen.site)]):
        earlier = run.pairs.attention_mask.bool()
        earlier[:, -1] = False
        count += int(earlier.sum())
        # The tokens that are not in the run come before any edit.
        in_run = earlier[:, -run.dense.context.input_ids.shape[1] :]
        total += kl_sum(pair.dense, run.dense, ending_under_edit(pair, run, chosen), in_run)
    return total / count if count else 0.0


def _kl_sum(unedited: Float[Tensor, "b kept vocab"], edited: Float[Tensor, "b kept vocab"]) -> float:
    return kl_divergence(unedited.flatten(0, 1), edited.flatten(0, 1)).item()


def _cross_entropy_sum(
    logits: Float[Tensor, "b kept vocab"], ids: Int[Tensor, "b s"], tokens: Int[Tensor, " kept"]
) -> float:
    """Next-token cross-entropy, summed over these tokens of each row but its last."""
    tokens = tokens[tokens < ids.shape[1] - 1]
    targets = ids[:, tokens + 1].flatten().to(logits.device)
    logits = logits[:, : len(tokens)].flatten(0, 1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    # In float64, since what is reported is a small difference of two sums.
    return F.cross_entropy(logits.to(wide), targets, reduction="none").double().sum().item()
