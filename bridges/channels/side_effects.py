"""What an edit costs elsewhere, and how faithfully the dense model follows the sparse one under it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bridges.bridge import BridgeSet
from bridges.channels.find import CHOSEN_ON
from bridges.channels.prompts import (
    Channels,
    Prompts,
    check_channels,
    frozen_pair,
    logits_off,
    logits_under,
    pairs_of,
    prompts_of,
    text_of,
)
from bridges.models.residual import ResidualModel
from bridges.objective.hybrid import ModelPair, Side
from bridges.ops.kl import kl_divergence
from bridges.steering.delta import dense_addend, edited_logits, mask_channels
from bridges.steering.edits import Edit
from bridges.tasks.pairs import MAX_TOKENS, TASKS, TaskPairs, probability, solved, task_pairs

AGREEMENT_STRENGTHS = (0.25, 0.5, 0.75, 1.0)
SHUFFLES = 4
STILL = 1e-6
"""An answer that changes by no more, nats, did not move: such changes are rounding."""
OTHER_PROMPTS = 16
"""Prompts of each other task that side effects are measured on."""


class Agreement(NamedTuple):
    """How well the change of the sparse model's answer under an edit predicts the dense model's.

    Over prompts and strengths; an answer is log P(target) - log P(answer), nats.
    """

    slope: float
    """Dense change per sparse change, least squares."""
    r_squared: float
    sign: float | None
    """Part of prompts and strengths at which both answers move to one side, of those where the sparse one moves; None
    where it never does."""
    r_squared_shuffled: float | None
    """The control: the sparse model is edited at as many other channels, of those that the prompts change there; None
    where there are fewer."""

    def __str__(self) -> str:
        control = "none" if self.r_squared_shuffled is None else f"{self.r_squared_shuffled:.2f}"
        return (
            f"intervention agreement: slope {self.slope:.2f}, R squared {self.r_squared:.2f} "
            f"(shuffled channels {control}), same sign {'none' if self.sign is None else f'{self.sign:.0%}'}"
        )


class SideEffects(NamedTuple):
    """What the edit does to text that has nothing to do with the task, at every position of it."""

    kl: float
    """KL of the dense model with the channels turned off from the unedited one, nats per token."""
    ce_change: float
    """The change of next-token cross-entropy with it, nats."""
    p_target_off: float
    """P(target) with the channels turned off, on the prompts of the way round that turns the answer more."""
    kl_added: float
    """KL with each channel's mean change added everywhere, whether the text calls for it or not."""
    kl_before_answer: float
    """KL of the counterfactual edit on the task's own prompts, over the tokens before the answer's."""
    tokens: int
    kl_other_tasks: float | None = None
    """KL at the answers of other tasks' prompts with the channels off."""
    solved_other_tasks: tuple[float, float] | None = None
    """Part of those prompts that the dense model solves, unedited and with the channels off."""

    def __str__(self) -> str:
        others = ""
        if self.kl_other_tasks is not None and self.solved_other_tasks is not None:
            before, after = self.solved_other_tasks
            others = f", at other tasks' answers {self.kl_other_tasks:.3f} (solved {before:.0%} -> {after:.0%})"
        return (
            f"side effects on {self.tokens} tokens of other text: channels off everywhere, KL {self.kl:.3f} nats, "
            f"cross-entropy {self.ce_change:+.3f}, P(target) the better way round {self.p_target_off:.3f}{others}; "
            f"the change added everywhere, KL {self.kl_added:.3f}; the edit itself, on the prompts before the answer, "
            f"KL {self.kl_before_answer:.3f}"
        )


@torch.no_grad()
def intervention_agreement(pair: ModelPair, prompts: Prompts, chosen: Channels) -> Agreement:
    """Turn the same channels in both models at several strengths; other channels in the sparse one as a control."""
    dense, sparse = (_answer_changes(pair, prompts, chosen, side) for side in ("dense", "sparse"))
    moved = sparse.abs() > STILL
    slope, r_squared = _fit(sparse, dense)
    generator = torch.Generator().manual_seed(0)
    changed = prompts.dz[pair.bridge_set.index(chosen.site)].flatten(0, 1).any(0)
    changed[list(chosen.channels)] = False
    others = changed.nonzero().squeeze(1).cpu()
    shuffled = []
    for _ in range(SHUFFLES if len(others) >= len(chosen.channels) else 0):
        drawn = others[torch.randperm(len(others), generator=generator)[: len(chosen.channels)]].tolist()
        elsewhere = _answer_changes(pair, prompts, chosen._replace(channels=tuple(drawn)), "sparse")
        shuffled.append(_fit(elsewhere, dense)[1])
    sign = (sparse[moved].sign() == dense[moved].sign()).double().mean().item() if moved.any() else None
    return Agreement(slope, r_squared, sign, sum(shuffled) / len(shuffled) if shuffled else None)


def _answer_changes(
    pair: ModelPair, prompts: Prompts, chosen: Channels, side: Side
) -> Float[Tensor, "strengths prompts"]:
    """Change of log P(target) - log P(answer) in one model under the counterfactual edit."""
    before = _answer(prompts.traces.side(side).logits, prompts.pairs)
    edits = (logits_under(pair, prompts, chosen, strength, side) for strength in AGREEMENT_STRENGTHS)
    return torch.stack([_answer(logits, prompts.pairs) - before for logits in edits]).cpu()


def _answer(logits: Float[Tensor, "b s vocab"], pairs: TaskPairs) -> Float[Tensor, " b"]:
    last = logits[:, -1].double()
    targets, answers = (probability(last, tokens) for tokens in (pairs.targets, pairs.answers))
    # Some probabilities are 0 to the last bit, in a model that is sure of another token.
    return targets.clamp(min=1e-30).log() - answers.clamp(min=1e-30).log()


def _fit(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope and R squared of the least-squares line of y on x; nothing is explained by an x that does not vary."""
    x, y = x.flatten() - x.mean(), y.flatten() - y.mean()
    if x.abs().max() <= STILL or y.abs().max() <= STILL:
        return 0.0, 0.0
    slope = (x @ y) / (x @ x)
    return slope.item(), ((x @ y).square() / ((x @ x) * (y @ y))).item()


@torch.no_grad()
def side_effects(
    pair: ModelPair,
    prompts: Prompts,
    chosen: Channels,
    text: Int[Tensor, "rows seq"],
    others: Sequence[TaskPairs] = (),
    batch_size: int = 16,
) -> SideEffects:
    """Measure what an edit of the channels that knows no counterfactual prompt does at every position of `text`.

    Two such edits: the channels off (set to 0), and each channel's mean change at the token it changes most, added; of
    the latter the mean over both ways round of the task. The first also on the prompts of `others`.
    """
    i = pair.bridge_set.index(chosen.site)
    site = pair.site("dense", i)
    addends = [dense_addend(pair, i, dz, chosen.at) for dz in constant_changes(prompts, i, chosen.channels)]
    kl, kl_added, ce = 0.0, 0.0, 0.0
    for start in range(0, len(text), batch_size):
        ids = text[start : start + batch_size]
        here = text_of(pair, ids)
        trace, off = here.trace, logits_off(pair, here, chosen)
        kl += kl_divergence(trace.logits.flatten(0, 1), off.flatten(0, 1)).item()
        ce += _cross_entropy(off, ids) - _cross_entropy(trace.logits, ids)
        for addend in addends:
            logits = edited_logits(pair.dense, trace, site, addend.expand(*ids.shape, -1), chosen.at)
            kl_added += kl_divergence(trace.logits.flatten(0, 1), logits.flatten(0, 1)).item() / len(addends)
    tokens = text.numel()
    before_answer = _kl_before_answer(pair, prompts, chosen)
    p_off = _p_target_off(pair, prompts, chosen)
    off_text = SideEffects(kl / tokens, ce / (tokens - len(text)), p_off, kl_added / tokens, before_answer, tokens)
    return off_text._replace(**_on_other_tasks(pair, chosen, others)) if others else off_text


def other_tasks(task: str, tokenizer: Any, limit: int | None = None) -> list[TaskPairs]:
    """A few pairs of every task but one, of `limit` tokens at most; a warning names those that cannot be made so."""
    most = MAX_TOKENS if limit is None else min(limit, MAX_TOKENS)
    found = []
    for other in TASKS:
        if other != task:
            try:
                found.append(task_pairs(other, tokenizer, OTHER_PROMPTS, max_tokens=most))
            except ValueError as error:
                warnings.warn(f"side effects leave out the task {other!r}: {error}", stacklevel=2)
    return found


def _on_other_tasks(pair: ModelPair, chosen: Channels, others: Sequence[TaskPairs]) -> dict[str, Any]:
    kl, before, after, count = 0.0, 0, 0, 0
    for pairs in (one.to(pair.dense.device) for one in others):
        plain, off = _with_and_without(pair, chosen, pairs)
        kl += kl_divergence(plain, off).item()
        before += int(solved(plain, pairs).sum())
        after += int(solved(off, pairs).sum())
        count += len(plain)
    return {"kl_other_tasks": kl / count, "solved_other_tasks": (before / count, after / count)}


def _with_and_without(
    pair: ModelPair, chosen: Channels, pairs: TaskPairs
) -> tuple[Float[Tensor, "b vocab"], Float[Tensor, "b vocab"]]:
    """The dense model's logits at the answers of a task, unedited and with the channels off."""
    here = text_of(pair, pairs.input_ids, pairs.attention_mask)
    return here.trace.logits[:, -1], logits_off(pair, here, chosen)[:, -1]


def _p_target_off(pair: ModelPair, prompts: Prompts, chosen: Channels) -> float:
    p = probability(_with_and_without(pair, chosen, prompts.pairs)[1], prompts.pairs.targets)
    sides = [p[prompts.pairs.direction == side] for side in (0, 1)]
    return max(one.mean().item() for one in sides if len(one))


def constant_changes(prompts: Prompts, i: int, channels: Sequence[int]) -> Float[Tensor, "2 d_sparse"]:
    """dz of the channels as one number each, per way round: the mean over prompts of the change of largest size."""
    dz = mask_channels(prompts.dz[i], channels)
    largest = dz.gather(1, dz.abs().argmax(1, keepdim=True)).squeeze(1)
    return torch.stack([largest[prompts.pairs.direction.to(dz.device) == side].mean(0) for side in (0, 1)])


def constant_edits(
    dense: nn.Module | ResidualModel,
    sparse: nn.Module | ResidualModel,
    bridge_set: BridgeSet,
    chosen: Channels,
    task: str | TaskPairs,
    direction: Literal[0, 1] = 0,
    n: int = CHOSEN_ON,
    *,
    tokenizer: Any = None,
    seed: int = 0,
    check_models: bool = True,
) -> list[Edit]:
    """The counterfactual edit of some channels as one number each, for saving and exporting.

    Each channel's mean change, over `n` pairs of the task, at the token it changes most; `direction` 0 takes the task's
    first prompt to its second.
    """
    if direction not in (0, 1) or n < 2:
        raise ValueError(f"direction={direction} must be 0 or 1, and n={n} at least 2, which holds both ways round")
    with frozen_pair(dense, sparse, bridge_set, check_models) as pair:
        check_channels(pair, chosen)
        pairs = pairs_of(task, dense, tokenizer, n, seed)
        if not (pairs.direction == direction).any():
            raise ValueError(
                f"direction={direction}: none of the task's {len(pairs.direction)} pairs is that way round"
            )
        prompts = prompts_of(pair, pairs)
        i = bridge_set.index(chosen.site)
        bridge = bridge_set[i]
        values = constant_changes(prompts, i, chosen.channels)[direction] * bridge.gain_sparse / bridge.rms_sparse
    return [Edit(chosen.site, channel, values[channel].item(), "add") for channel in chosen.channels]


def _kl_before_answer(pair: ModelPair, prompts: Prompts, chosen: Channels) -> float:
    """KL that the counterfactual edit makes at the prompts' other tokens, whose answers it is not meant to change."""
    logits = logits_under(pair, prompts, chosen)
    other = prompts.pairs.attention_mask.bool()
    other[:, -1] = False
    count = int(other.sum())
    return kl_divergence(prompts.traces.dense.logits[other], logits[other]).item() / count if count else 0.0


def _cross_entropy(logits: Tensor, ids: Tensor) -> float:
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten().to(logits.device), reduction="sum"
    ).item()
