"""What an edit costs elsewhere, and how faithfully the dense model follows the sparse one under it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bridges.bridge import BridgeSet
from bridges.channels import (
    CHOSEN_ON,
    Channels,
    Prompts,
    addend_of,
    model_pair,
    pairs_of,
    predicted_effects,
    prompts_of,
)
from bridges.circuits.tasks import TaskPairs, probability
from bridges.edits import Edit
from bridges.intervention import At, as_read, dense_addend, edited_logits, only
from bridges.models.residual import ResidualModel
from bridges.ops.kl import kl_divergence
from bridges.training.hybrid import ModelPair, Side

AGREEMENT_CHANNELS = 8
AGREEMENT_STRENGTHS = (0.25, 0.5, 1.0)
SHUFFLES = 3


class Agreement(NamedTuple):
    """How well the change of the sparse model's answer under an edit predicts the dense model's.

    Over single channels, prompts and strengths; an answer is log P(target) - log P(answer), nats.
    """

    slope: float
    """Dense change per sparse change, least squares."""
    r_squared: float
    sign: float
    """Part of the edits that move both answers to one side, of those that move the sparse one at all."""
    r_squared_shuffled: float
    """The same where the sparse model is edited at other channels of the site, drawn at random: the control."""
    channels: int

    def __str__(self) -> str:
        return (
            f"intervention agreement over {self.channels} channels: slope {self.slope:.2f}, R squared "
            f"{self.r_squared:.2f} (shuffled channels {self.r_squared_shuffled:.2f}), same sign {self.sign:.0%}"
        )


class SideEffects(NamedTuple):
    """What the edit does at every position of text that has nothing to do with the task."""

    kl: float
    """KL of the edited from the unedited dense model, nats per token."""
    ce_change: float
    """Change of next-token cross-entropy, nats."""
    tokens: int
    kl_at_cue: float
    """The same KL on the task's own prompts, over the tokens before the answer's."""

    def __str__(self) -> str:
        return (
            f"side effects on {self.tokens} tokens of other text, edited at every one: KL {self.kl:.3f} nats, "
            f"cross-entropy {self.ce_change:+.3f}; on the prompts before the answer: KL {self.kl_at_cue:.3f}"
        )


@torch.no_grad()
def intervention_agreement(pair: ModelPair, prompts: Prompts, chosen: Channels) -> Agreement:
    """Turn single channels in both models: those chosen, then those of largest predicted effect at the same place."""
    i, at = pair.bridge_set.index(chosen.site), chosen.at
    ranked = predicted_effects(pair, prompts)[i, at].abs().argsort(descending=True).tolist()
    channels = list(dict.fromkeys([*chosen.channels, *ranked]))[: max(AGREEMENT_CHANNELS, len(chosen.channels))]
    dense = torch.stack([_answer_change(pair, prompts, "dense", i, at, c) for c in channels])
    sparse = torch.stack([_answer_change(pair, prompts, "sparse", i, at, c) for c in channels])
    generator = torch.Generator().manual_seed(0)
    others = []
    for _ in range(SHUFFLES):
        drawn = torch.randperm(pair.sparse.d_model, generator=generator)[: len(channels)].tolist()
        elsewhere = [_answer_change(pair, prompts, "sparse", i, at, c) for c in drawn]
        others.append(_fit(torch.stack(elsewhere), dense)[1])
    slope, r_squared = _fit(sparse, dense)
    moved = sparse.abs() > 1e-6
    sign = (sparse[moved].sign() == dense[moved].sign()).double().mean().item() if moved.any() else float("nan")
    return Agreement(slope, r_squared, sign, sum(others) / len(others), len(channels))


def _answer_change(
    pair: ModelPair, prompts: Prompts, side: Side, i: int, at: At, channel: int
) -> Float[Tensor, "strengths prompts"]:
    """Change of log P(target) - log P(answer) in one model under the counterfactual edit of one channel."""
    if side == "dense":
        addend = dense_addend(pair, i, only(prompts.streams[i], [channel]), at)
    else:
        addend = only((prompts.streams if at == "residual" else prompts.reads)[i], [channel])
    model, trace, site = pair.model(side), prompts.traces.side(side), pair.site(side, i)
    before = _answer(trace.logits, prompts.pairs)
    edits = (edited_logits(model, trace, site, strength * addend, at) for strength in AGREEMENT_STRENGTHS)
    return torch.stack([_answer(logits, prompts.pairs) - before for logits in edits])


def _answer(logits: Float[Tensor, "b s vocab"], pairs: TaskPairs) -> Float[Tensor, " b"]:
    last = logits[:, -1].double()
    return probability(last, pairs.targets).log() - probability(last, pairs.answers).log()


def _fit(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope and R squared of the least-squares line of y on x; nothing is explained by an x that does not vary."""
    x, y = x.flatten() - x.mean(), y.flatten() - y.mean()
    if x.square().sum() == 0 or y.square().sum() == 0:
        return 0.0, 0.0
    slope = (x @ y) / (x @ x)
    return slope.item(), ((x @ y).square() / ((x @ x) * (y @ y))).item()


@torch.no_grad()
def side_effects(
    pair: ModelPair, prompts: Prompts, chosen: Channels, text: Int[Tensor, "rows seq"], batch_size: int = 16
) -> SideEffects:
    """Add the edit at every position of `text`, as a constant: each channel's mean change at the token it changes most.

    The mean over both ways round of the task.
    """
    i = pair.bridge_set.index(chosen.site)
    site, kl, ce, tokens = pair.site("dense", i), 0.0, 0.0, 0
    constants = constant_changes(prompts, i, chosen.channels)
    for start in range(0, len(text), batch_size):
        ids = text[start : start + batch_size].to(pair.dense.device)
        trace = pair.dense.trace(ids)
        for dz in constants:
            delta = pair.bridge_set[i].decode_delta(dz).expand(*ids.shape, -1)
            addend = as_read(pair.dense.norm(site), pair.bridge_set[i].rms_dense, delta, chosen.at)
            logits = edited_logits(pair.dense, trace, site, addend, chosen.at)
            kl += kl_divergence(trace.logits.flatten(0, 1), logits.flatten(0, 1)).item() / len(constants)
            ce += (_cross_entropy(logits, ids) - _cross_entropy(trace.logits, ids)) / len(constants)
        tokens += ids.numel()
    predictions = tokens - len(text)
    return SideEffects(kl / tokens, ce / predictions, tokens, _kl_before_answer(pair, prompts, chosen))


def constant_changes(prompts: Prompts, i: int, channels: Sequence[int]) -> Float[Tensor, "2 d_sparse"]:
    """dz of the channels as one number each, per way round: the mean over prompts of the change of largest size."""
    dz = only(prompts.streams[i], channels)
    largest = dz.gather(1, dz.abs().argmax(1, keepdim=True)).squeeze(1)
    return torch.stack([largest[prompts.pairs.direction == side].mean(0) for side in (0, 1)])


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
    with model_pair(dense, sparse, bridge_set, check_models) as pair:
        prompts = prompts_of(pair, pairs_of(task, dense, tokenizer, n, seed))
        i = bridge_set.index(chosen.site)
        bridge = bridge_set[i]
        values = constant_changes(prompts, i, chosen.channels)[direction] * bridge.gain_sparse / bridge.rms_sparse
    return [Edit(chosen.site, channel, values[channel].item(), "add") for channel in chosen.channels]


def _kl_before_answer(pair: ModelPair, prompts: Prompts, chosen: Channels) -> float:
    """KL that the counterfactual edit makes at the prompts' other tokens, whose answers it is not meant to change."""
    i = pair.bridge_set.index(chosen.site)
    addend = addend_of(pair, prompts, chosen)
    logits = edited_logits(pair.dense, prompts.traces.dense, pair.site("dense", i), addend, chosen.at)
    other = prompts.pairs.attention_mask.bool()
    other[:, -1] = False
    count = int(other.sum())
    return kl_divergence(prompts.traces.dense.logits[other], logits[other]).item() / count if count else 0.0


def _cross_entropy(logits: Tensor, ids: Tensor) -> float:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").item()
