"""What an edit does where it should do nothing: on other text, on other tasks, and before the answer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from bridges.channels.constant_edits import constant_changes
from bridges.channels.prompts import Channels, Prompts, ablated_logits, logits_under_edit, run_reference_text
from bridges.objective.hybrid import ModelPair
from bridges.ops.kl import kl_divergence
from bridges.steering.delta import dense_addend, edited_logits
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
    batch_size: int = 16,
) -> SideEffects:
    """Measure the side effects of channels on `text`, on the task's own prompts and on pairs of other tasks.

    `kl_added` is the mean over both task orders.
    """
    i = pair.bridge_set.index(chosen.site)
    site = pair.site("dense", i)
    addends = [dense_addend(pair, i, dz, chosen.at) for dz in constant_changes(prompts, i, chosen.channels)]
    kl, kl_added, ce = 0.0, 0.0, 0.0
    for ids in text.split(batch_size):
        reference = run_reference_text(pair, ids)
        unedited, ablated = reference.trace.logits, ablated_logits(pair, reference, chosen)
        kl += _kl_sum(unedited, ablated)
        ce += _cross_entropy_sum(ablated, ids) - _cross_entropy_sum(unedited, ids)
        for addend in addends:
            logits = edited_logits(pair.dense, reference.trace, site, addend.expand(*ids.shape, -1), chosen.at)
            kl_added += _kl_sum(unedited, logits) / len(addends)
    tokens = text.numel()
    effects = SideEffects(
        kl=kl / tokens,
        ce_change=ce / (tokens - len(text)),
        p_target_off=_p_target_ablated(pair, prompts, chosen),
        kl_added=kl_added / tokens,
        kl_before_answer=_kl_before_answer(pair, prompts, chosen),
        tokens=tokens,
    )
    return effects._replace(**_on_other_tasks(pair, chosen, other_pairs)) if other_pairs else effects


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


def _on_other_tasks(pair: ModelPair, chosen: Channels, other_pairs: Sequence[TaskPairs]) -> dict[str, Any]:
    kl, before, after, count = 0.0, 0, 0, 0
    for pairs in (one.to(pair.dense.device) for one in other_pairs):
        unedited, ablated = _answer_logits(pair, chosen, pairs)
        kl += kl_divergence(unedited, ablated).item()
        before += int(solved(unedited, pairs).sum())
        after += int(solved(ablated, pairs).sum())
        count += len(unedited)
    return {"kl_other_tasks": kl / count, "solved_other_tasks": (before / count, after / count)}


def _answer_logits(
    pair: ModelPair, chosen: Channels, pairs: TaskPairs
) -> tuple[Float[Tensor, "b vocab"], Float[Tensor, "b vocab"]]:
    """The dense model's logits at a task's answers, unedited and with the channels ablated."""
    reference = run_reference_text(pair, pairs.input_ids, pairs.attention_mask)
    return reference.trace.logits[:, -1], ablated_logits(pair, reference, chosen)[:, -1]


def _p_target_ablated(pair: ModelPair, prompts: Prompts, chosen: Channels) -> float:
    """The mean over the prompts of one task order, the larger of the two."""
    p = probability(_answer_logits(pair, chosen, prompts.pairs)[1], prompts.pairs.targets)
    by_direction = [p[prompts.pairs.direction == direction] for direction in (0, 1)]
    return max(one.mean().item() for one in by_direction if len(one))


def _kl_before_answer(pair: ModelPair, prompts: Prompts, chosen: Channels) -> float:
    """The edit is not meant to change what follows any token but the last."""
    edited = logits_under_edit(pair, prompts, chosen)
    earlier = prompts.pairs.attention_mask.bool()
    earlier[:, -1] = False
    count = int(earlier.sum())
    return kl_divergence(prompts.traces.dense.logits[earlier], edited[earlier]).item() / count if count else 0.0


def _kl_sum(unedited: Float[Tensor, "b s vocab"], edited: Float[Tensor, "b s vocab"]) -> float:
    return kl_divergence(unedited.flatten(0, 1), edited.flatten(0, 1)).item()


def _cross_entropy_sum(logits: Float[Tensor, "b s vocab"], ids: Int[Tensor, "b s"]) -> float:
    targets = ids[:, 1:].flatten().to(logits.device)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum").item()
