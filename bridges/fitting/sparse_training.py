"""The sparse model of a fit that trains it: its optimiser, its support, its density (method, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from bridges.config import FitConfig
from bridges.fitting.checkpoint import restore_optimizer
from bridges.fitting.start import StartState
from bridges.sparsity import projection
from bridges.sparsity.moving import MOVE_UNTIL, MoveSchedule, moved_masks
from bridges.sparsity.support import Support, training_kernels

MIN_PER_CHANNEL = 1
"""Nonzero weights that every neuron and attention channel keeps at least where the support moves."""


def prune_to_start(model: nn.Module, config: FitConfig) -> None:
    """Prune a sparse model whose support is to move to its first density, before anything is fitted to its streams.

    ValueError if the model is much sparser already: the support would first fill up with zeros.
    """
    if config.support != "moving" or not config.steps:
        return
    found = projection.density(model)
    if found < config.start_density / 2:
        raise ValueError(
            f"start_density={config.start_density:g} is far over the sparse model's own density, {found:.3g}, and a "
            f"moving support only falls; pass start_density={found:.3g}"
        )
    if config.start_density < 1:
        projection.project(model, config.start_density, MIN_PER_CHANNEL)


class SparseTraining:
    """The optimiser of a sparse model, and which of its weights may differ from zero.

    In a step: the gradients inside `kernels`, then `gather_gradients` and `step`.
    """

    def __init__(self, model: nn.Module, config: FitConfig, start: StartState):
        self.model, self.config = model, config
        self._schedule = _move_schedule(config)
        self.support = self._first_support(start)
        """The nonzeros that alone train; None where all weights do."""
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained if self.support is None else self.support.parameters(),
            lr=config.sparse_lr,
            betas=(0.9, 0.95),
            eps=config.sparse_eps,
            weight_decay=config.sparse_weight_decay,
        )
        restore_optimizer(self.optimizer, start.sparse_optimizer)
        self._whole_gradients: dict[str, Tensor] = {}

    def _first_support(self, start: StartState) -> Support | None:
        c = self.config
        if c.target_density is not None and c.support == "projected":
            return None
        masks = projection.supports(self.model) if start.supports is None else start.supports
        if c.support == "moving" and c.start_density == 1 and start.supports is None:  # biases of zero train as well
            masks = {name: torch.ones_like(mask) for name, mask in masks.items()}
        return Support(self.model, masks, use_kernels=c.mixed_precision == "no")

    def parameters(self) -> list[Tensor]:
        """What the optimiser trains."""
        return self.optimizer.param_groups[0]["params"]

    def kept_fraction(self, step: int) -> float:
        """Part of the model's weights kept after a step; that of a moving support changes where it moves."""
        c, schedule = self.config, self._schedule
        if c.target_density is None:
            return 1.0
        if schedule is not None:
            moves = (s for s in (step - step % schedule.every, schedule.arrival) if 0 < s <= step and self.moves(s))
            step = max(moves, default=0)
            if not step:
                return c.start_density
        return projection.kept_fraction(step, c.steps, c.target_density, c.anneal, c.start_density)

    def moves(self, step: int) -> bool:
        """Whether the support moves after a step."""
        return self._schedule is not None and self._schedule.moves_after(step)

    def kernels(self, step: int) -> AbstractContextManager[None]:
        """`training_kernels` of a step."""
        return training_kernels(self.model, self.support, self.config.mixed_precision, self.moves(step))

    def gather_gradients(self, step: int, sum_over_processes: Callable[[Iterable[Tensor]], None]) -> None:
        """Bring all gradients, summed over processes, to `parameters`."""
        if self.support is None:
            sum_over_processes(self.parameters())
        else:
            self._whole_gradients = self.support.sum_gradients(sum_over_processes, self.moves(step))

    def step(self, step: int) -> None:
        """Step the optimiser, then set to zero what is to be zero."""
        c, kept = self.config, self.kept_fraction(step)
        self.optimizer.param_groups[0]["lr"] = projection.learning_rate(
            step, c.steps, c.sparse_lr, kept=kept, target=c.target_density or kept
        )
        projection.clip_to_rms(self.parameters())
        self.optimizer.step()
        if self.support is not None:
            self.support.scatter()
            if self._schedule is not None and self._schedule.moves_after(step):
                self._move(self.support, self._schedule, step)
        elif c.target_density is not None:
            projection.project(self.model, kept)

    def _move(self, support: Support, schedule: MoveSchedule, step: int) -> None:
        """Let the least important weights make room for the zeros of largest gradient."""
        masks = moved_masks(
            self.model,
            support.masks,
            self._whole_gradients,
            self.kept_fraction(step),
            schedule.share_at(step),
            MIN_PER_CHANNEL,
            support.saliencies(self.optimizer),
        )
        support.move(masks, self.optimizer)
        self._whole_gradients = {}


def _move_schedule(config: FitConfig) -> MoveSchedule | None:
    """When the support moves; None where it does not."""
    c = config
    if c.support != "moving" or c.target_density is None:
        return None
    falls = c.target_density < c.start_density
    return MoveSchedule(c.steps, c.move_every, c.move_share, MOVE_UNTIL, c.anneal, falls)
