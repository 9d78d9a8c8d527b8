"""A support that moves: the least important weights make room for the zeros whose gradient is largest.

Source: the scheme of RigL (Evci et al. 2020), with the kept fraction falling at the same time. Between two moves only
the nonzeros are multiplied and trained, so the cost of a step follows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bridges.ops.abs_topk import abs_topk_mask
from bridges.sparsity.projection import channel_dim, largest, sparse_parameters

MOVE_UNTIL = 0.85
"""The fraction of the steps after which a support stays, where no setting says another."""


def moving_share(step: int, steps: int, start: float, until: float) -> float:
    """The share of the support that moves at a step: a cosine from `start` to 0 at step until * steps.

    >>> [round(moving_share(step, 100, 0.2, until=0.8), 3) for step in (0, 40, 80, 100)]
    [0.2, 0.1, 0.0, 0.0]
    """
    return start * 0.5 * (1 + math.cos(math.pi * step / (until * steps))) if step < until * steps else 0.0


@dataclass(frozen=True)
class MoveSchedule:
    """After which steps of a run, counted from 1, a support moves, and how much of it.

    It moves at intervals until a fraction of the steps, or until its density has arrived at the target if that is
    later, and in the step in which the density arrives.

    >>> schedule = MoveSchedule(steps=40, every=15, share=0.2, until=0.5, anneal=0.3, density_falls=True)
    >>> [step for step in range(1, 41) if schedule.moves_after(step)]
    [12, 15]
    """

    steps: int
    """Of the whole run."""
    every: int
    """Steps between two moves."""
    share: float
    """The part of the support that a move replaces at the start; it decays to 0 with a cosine."""
    until: float
    """The fraction of the steps after which the support stays."""
    anneal: float
    """The fraction of the steps over which the density goes to its target."""
    density_falls: bool
    """False where it is at its target from the start."""

    @property
    def arrival(self) -> int:
        """The step in which the density arrives at its target."""
        return max(1, math.ceil(self.anneal * self.steps))

    def moves_after(self, step: int) -> bool:
        """Whether the support moves after a step."""
        arrives = self.density_falls and step == self.arrival
        return arrives or (step % self.every == 0 and step <= max(self.until, self.anneal) * self.steps)

    def share_at(self, step: int) -> float:
        """The part of the support that a move after this step replaces."""
        return moving_share(step, self.steps, self.share, self.until)


@torch.no_grad()
def saliency(
    values: Float[Tensor, " nonzeros"], squared_gradients: Float[Tensor, " nonzeros"]
) -> Float[Tensor, " nonzeros"]:
    """|w| times the root mean square of its gradient, whose square is twice the loss that removing w costs.

    The second-order term of the loss, with the Fisher information for the Hessian (Optimal Brain Damage, Le Cun et al.
    1990). A large weight that nothing depends on has none.

    >>> saliency(torch.tensor([2.0, -1.0]), torch.tensor([0.0, 9.0]))
    tensor([0., 3.])
    """
    return values.abs() * squared_gradients.sqrt()


@torch.no_grad()
def moved_masks(
    model: nn.Module,
    masks: Mapping[str, Bool[Tensor, "*shape"]],
    gradients: Mapping[str, Float[Tensor, "*shape"]],
    kept: float,
    share: float,
    min_per_channel: int = 1,
    importance: Mapping[str, Float[Tensor, "*shape"]] | None = None,
) -> dict[str, Bool[Tensor, "*shape"]]:
    """The next support of each of the model's `sparse_parameters` that train; the others keep theirs.

    Args:
        model: holds the weights, zero outside `masks`.
        masks: the present support, by name.
        gradients: of whole tensors, by name; a tensor without one grows nothing.
        kept: the fraction of entries in the next support; each tensor gets max(1, round(kept * numel)).
        share: the part of these that are new.
        min_per_channel: how many of its most important weights every neuron and attention channel keeps; it has at
            least as many if it had before.
        importance: what weights are ranked by, of whole tensors, by name; None: their magnitude.
    """
    found = dict(masks)
    for name, parameter in sparse_parameters(model):
        if parameter.requires_grad:
            count = max(1, round(kept * parameter.numel()))
            found[name] = moved_mask(
                parameter,
                masks[name],
                gradients.get(name),
                count,
                round(share * count),
                channel_dim(name),
                min_per_channel,
                None if importance is None else importance.get(name),
            )
    return found


@torch.no_grad()
def moved_mask(
    weight: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"] | None,
    count: int,
    n_new: int,
    dim: int | None = None,
    min_per_channel: int = 0,
    importance: Float[Tensor, "*shape"] | None = None,
) -> Bool[Tensor, "*shape"]:
    """A support of `count` entries: the weights of largest `importance`, and `n_new` zeros of largest gradient.

    Without `importance` weights are ranked by magnitude. There are more new ones where the present support has too few
    to keep, and fewer where there are too few zeros, or where the minimum per channel (dimension `dim`) keeps more.
    Ties go to the lowest index.
    """
    mask = mask.to(weight.device)
    n_present = int(mask.sum())
    n_new = 0 if gradient is None else min(n_new, mask.numel() - n_present)
    # Entries of the support that are exactly zero are smaller than all others, but come before those outside it.
    ranked_by = weight.detach() if importance is None else importance
    size = torch.where(mask, ranked_by.abs() + torch.finfo(weight.dtype).tiny, 0)
    n_kept = min(count - n_new, n_present)
    reserves = dim is not None and min_per_channel > 0
    kept = largest(size, max(1, n_kept), dim, min_per_channel) & mask if n_kept or reserves else torch.zeros_like(mask)
    missing = count - int(kept.sum())
    if gradient is None or missing <= 0:
        return kept
    zeros = (~mask).flatten().nonzero().squeeze(1)
    grown = abs_topk_mask(gradient.flatten()[zeros], min(missing, len(zeros))) if len(zeros) else zeros.bool()
    kept.view(-1)[zeros[grown]] = True
    return kept
