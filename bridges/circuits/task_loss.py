"""The loss of a binary task: cross-entropy over its two answers, with a scale and a shift of their logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bridges.circuits.prefixes import Prefixes, last_logits
from bridges.models.sparse.model import SparseTransformer
from bridges.tasks.pairs import TaskPairs
from bridges.tasks.token_sets import TokenSets

MAX_SCALE = 32.0
"""The most that logits may be scaled by: where every prompt is answered right, the best scale is infinite."""
LBFGS_STEPS = 16


class Presented(NamedTuple):
    """Both prompts of some pairs, one below the other, with the right and the other answer of each."""

    input_ids: Int[Tensor, "n seq"]
    attention_mask: Int[Tensor, "n seq"]
    right: TokenSets
    other: TokenSets
    sign: Float[Tensor, " n"]
    """+1 where the task's first prompt is presented, -1 where its second is."""

    @classmethod
    def of(cls, pairs: TaskPairs, device: torch.device | str) -> Presented:
        """The original prompts, then the counterfactual ones."""
        n, answers, targets = len(pairs.input_ids), pairs.answer_sets, pairs.target_sets
        sign = 1.0 - 2.0 * pairs.direction
        return cls(
            torch.cat([pairs.input_ids, pairs.counterfactual_ids]).to(device),
            pairs.attention_mask.repeat(2, 1).to(device),
            _joined(answers, targets).to(device),
            _joined(targets, answers).to(device),
            torch.cat([sign, -sign])[: 2 * n].to(device),
        )

    def take(self, rows: Int[Tensor, " rows"]) -> Presented:
        """Some of the prompts."""
        ids, mask, sign = (tensor[rows] for tensor in (self.input_ids, self.attention_mask, self.sign))
        return Presented(ids, mask, self.right.take(rows), self.other.take(rows), sign)

    def differences(self, logits: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
        """The logit of the right answer minus that of the other.

        An answer that is a set of tokens has the logarithm of its summed exponentials.
        """
        return self.right.logsumexp(logits) - self.other.logsumexp(logits)


class Calibration(NamedTuple):
    """What the difference d of the two answers' logits is turned into before the loss: scale * d + shift * sign."""

    scale: float = 1.0
    shift: float = 0.0


def answer_differences(
    model: SparseTransformer, prompts: Presented, prefixes: Prefixes | None = None
) -> Float[Tensor, " n"]:
    """The differences of the answers' logits after the last token of every prompt.

    With `prefixes`, which must be those of the prompts, the pass computes each prefix once; see `last_logits`.
    """
    if prefixes is None:
        mask = None if bool(prompts.attention_mask.all()) else prompts.attention_mask
        logits = model(prompts.input_ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1]
    else:
        logits = last_logits(model, prefixes)
    return prompts.differences(logits)


def task_loss(
    differences: Float[Tensor, " n"],
    sign: Float[Tensor, " n"],
    scale: float | Tensor = 1.0,
    shift: float | Tensor = 0.0,
) -> Float[Tensor, ""]:
    """Mean over prompts of softplus(-(scale * d + shift * sign)), in nats; ln 2 is what guessing gives."""
    return F.softplus(-(scale * differences + shift * sign)).mean()


def accuracy(differences: Float[Tensor, " n"], sign: Float[Tensor, " n"], calibration: Calibration) -> float:
    """The share of prompts whose right answer is the more likely one."""
    return (calibration.scale * differences + calibration.shift * sign > 0).double().mean().item()


def calibrate(differences: Float[Tensor, " n"], sign: Float[Tensor, " n"]) -> Calibration:
    """The scale, at most `MAX_SCALE`, and the shift of least loss, by 16 steps of L-BFGS in float64 (paper A.5)."""
    d, s = differences.detach().double(), sign.double()
    # d is brought to a size of one first, so that one length of step suits circuits whose logits are tiny or huge.
    size = d.abs().mean().clamp(min=1e-9)
    with torch.enable_grad():
        free = torch.tensor([0.0, 0.0], dtype=torch.float64, device=d.device, requires_grad=True)

        def values() -> tuple[Tensor, Tensor]:
            return (free[0].exp() / size).clamp(max=MAX_SCALE), free[1]

        optimizer = torch.optim.LBFGS([free], max_iter=LBFGS_STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = task_loss(d, s, *values())
            loss.backward()
            return loss

        optimizer.step(closure)
        scale, shift = values()
    return Calibration(scale.item(), shift.item())


def _joined(first: TokenSets, second: TokenSets) -> TokenSets:
    """The sets of the rows of both, one below the other."""
    width = max(first.distinct.shape[1], second.distinct.shape[1])
    distinct = torch.cat([F.pad(one.distinct, (0, width - one.distinct.shape[1]), value=-1) for one in (first, second)])
    return TokenSets(distinct, torch.cat([first.index, second.index + len(first.distinct)]))
