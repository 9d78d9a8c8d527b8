"""The training loop: steps, optimisers, schedules and checkpoints, on one process or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridges.bridge_report import BridgeReport
from bridges.config import FitConfig
from bridges.data.random_state import preserve_random_state
from bridges.fitting.checkpoint import Checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from bridges.fitting.gradients import Objective, StepLosses, Weights, step_gradients, step_losses
from bridges.fitting.guards import interruptible, largest_gradient, refuse_not_finite
from bridges.fitting.processes import ProcessGroup
from bridges.fitting.selection import Selection, interval
from bridges.fitting.sparse_training import SparseTraining
from bridges.fitting.standardized import StandardizedBridges
from bridges.fitting.start import BEST_FILE, STANDARDIZED_FILE, StartState
from bridges.fitting.tracking import Tracker
from bridges.models.tokens import Batch
from bridges.objective.hybrid import random_path
from bridges.objective.pair import ModelPair, Side

FP16_LOSS_SCALE = 1024.0


class Trainer:
    """Gradient steps on the full objective, from a `StartState`; `checkpoint` gives what a run can resume from.

    The bridges, and a sparse model that trains, must hold their first values already: the support and the optimisers
    are built from them here.
    """

    def __init__(self, pair: ModelPair, config: FitConfig, processes: ProcessGroup, start: StartState | None = None):
        start = start or StartState()
        self.pair, self.config, self.processes = pair, config, processes
        self.step = start.step
        self.sparse = SparseTraining(pair.sparse.model, config, start) if config.train_sparse else None
        """What trains of the sparse model; None where it is frozen."""
        self.maps = StandardizedBridges(pair.bridge_set, start.standardizations)
        """What the bridges' optimiser steps on."""
        if start.standardized:
            self.maps.load(start.standardized)
        self.bridge_optimizer = torch.optim.AdamW(self.maps.parameter_groups(config.lr), weight_decay=0.0)
        self._rates = [group["lr"] for group in self.bridge_optimizer.param_groups]
        restore_optimizer(self.bridge_optimizer, start.bridge_optimizer)
        self.objective = _objective(config, processes)

    def sampled_sites(self, step: int) -> list[int]:
        """The sites whose hybrid passes run in a step: drawn evenly by seed and step, the same on every process."""
        n = len(self.pair.bridge_set)
        count = n if self.config.sites_per_step == "all" else min(self.config.sites_per_step, n)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        return sorted(torch.randperm(n, generator=generator)[:count].tolist())

    def sampled_path(self, step: int) -> tuple[Side, ...] | None:
        """A step's path that changes sides several times, the same on every process; None where it has no weight."""
        n = len(self.pair.bridge_set)
        if not self.config.path_weight or n < 2:
            return None
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) * 31 + 7)
        changes = int(torch.randint(2, n + 1, (), generator=generator))
        return random_path(n, changes, generator)

    def train_step(self, batches: Sequence[Batch]) -> StepLosses:
        """One step on this process's micro-batches; FloatingPointError, nothing changed, if figures are not finite."""
        step = self.step + 1
        sampled, path = self.sampled_sites(step), self.sampled_path(step)
        # Dropout is the only other user of randomness; seeded by the step, a resumed run draws what the first one did.
        torch.manual_seed((self.config.seed * 1_000_003 + step) * 1009 + self.processes.rank)
        self._zero_grad()
        with nullcontext() if self.sparse is None else self.sparse.kernels(step):
            figures = step_gradients(self.pair, batches, sampled, self.objective, path)
        self.processes.sum_gradients(self.pair.bridge_set.parameters())
        if self.sparse is not None:
            self.sparse.gather_gradients(step, self.processes.sum_gradients)
        largest = largest_gradient(self._parameters()).to(figures.ce)
        # The one place in a step where the host waits for a GPU. Weights have not changed yet, if the step is refused.
        losses = step_losses(self.pair, replace(figures, largest_gradient=largest), sampled, self.objective, path)
        refuse_not_finite(losses, step)
        for group, rate in zip(self.bridge_optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.lr(step) / self.config.lr
        self.maps.pull_gradients()
        self.bridge_optimizer.step()
        self.maps.fold()
        if self.sparse is not None:
            self.sparse.step(step)
        self.step = step
        return losses

    def lr(self, step: int) -> float:
        """The bridges' learning rate at a step, counted from 1."""
        return self.config.lr * (1 - (step - 1) / self.config.steps)

    def checkpoint(self) -> Checkpoint:
        """Everything that the next step depends on; `start_from_checkpoint` reads it."""
        tensors = {
            "bridges": self.pair.bridge_set.tensors(),
            "bridge_optimizer": optimizer_tensors(self.bridge_optimizer),
            STANDARDIZED_FILE: self.maps.tensors(),
        }
        if self.sparse is not None:
            tensors["sparse"] = dict(self.pair.sparse.model.named_parameters())
            tensors["sparse_optimizer"] = optimizer_tensors(self.sparse.optimizer)
            tensors["supports"] = {} if self.sparse.support is None else self.sparse.support.masks
        return Checkpoint(self.step, {}, {name: values for name, values in tensors.items() if values})

    def _parameters(self) -> Iterator[Tensor]:
        """What losses are backpropagated to: the bridges' plain weights, and what trains of the sparse model."""
        yield from self.pair.bridge_set.parameters()
        if self.sparse is not None:
            yield from self.sparse.parameters()

    def _zero_grad(self) -> None:
        for parameter in self._parameters():
            parameter.grad = None


def _objective(config: FitConfig, processes: ProcessGroup) -> Objective:
    return Objective(
        Weights(
            config.nmse_weight,
            config.kl_dense_to_sparse_weight,
            config.kl_sparse_to_dense_weight,
            config.ce_weight,
            config.path_weight,
        ),
        config.train_sparse,
        processes.all_reduce,
        processes.autocast,
        FP16_LOSS_SCALE if config.mixed_precision == "fp16" else 1.0,
    )


def train(
    trainer: Trainer,
    batches: Callable[[int], Sequence[Batch]],
    tracker: Tracker | None,
    save: Callable[[], Any],
    evaluate: Callable[[], BridgeReport],
    advance: Callable[[StepLosses], Any] = lambda losses: None,
    selection: Selection | None = None,
) -> None:
    """Run the steps that are left. `batches(step)` gives this process's micro-batches, steps counted from 1.

    With a `selection` the bridges end in the best state that it has seen.

    Ctrl-C (or SIGTERM) ends the run after the current step, with a checkpoint; a second Ctrl-C ends it at once.
    Global random state is left as it was.
    """
    config, processes = trainer.config, trainer.processes
    with interruptible() as interrupted, preserve_random_state():
        if selection is not None and selection.best is None and config.steps:
            selection.observe(0)
        while trainer.step < config.steps:
            started = time.perf_counter()
            if selection is not None:
                selection.keep()
            losses = trainer.train_step(batches(trainer.step + 1))
            row: dict[str, Any] = {"step": trainer.step, **losses.row()}
            row["tokens_per_second"] = round(losses.tokens / (time.perf_counter() - started), 1)
            row["lr"] = trainer.lr(trainer.step)
            if trainer.sparse is not None:
                row["kept_fraction"] = trainer.sparse.kept_fraction(trainer.step)
            measured = trainer.step % interval(config.steps) == 0 or trainer.step == config.steps
            if selection is not None and measured:
                row["selection/objective"] = selection.observe(trainer.step)
            if config.eval_every and trainer.step % config.eval_every == 0:
                row |= evaluate().flat()
            if tracker is not None:
                tracker.log(row)
            advance(losses)
            stop = processes.all_reduce(torch.tensor(float(interrupted.is_set()))).item() > 0
            if stop or trainer.step % config.checkpoint_every == 0 or trainer.step == config.steps:
                save()
            if stop:
                raise KeyboardInterrupt
    if selection is not None:
        selection.restore()


def checkpoint_saver(
    trainer: Trainer, folder: Path | None, state: dict[str, Any], selection: Selection | None = None
) -> Callable[[], None]:
    """A function that saves the trainer's present state from the main process while the others wait."""

    def save() -> None:
        if folder is not None and trainer.processes.is_main:
            save_checkpoint(folder, _with_best(trainer.checkpoint()._replace(state=state), selection))
        trainer.processes.barrier()

    return save


def _with_best(checkpoint: Checkpoint, selection: Selection | None) -> Checkpoint:
    """The checkpoint together with the best state so far."""
    if selection is None or selection.best is None:
        return checkpoint
    step, objective, start, tensors = selection.best
    # The state may be that of this very step: its tensors are then those of the bridges.
    tensors = checkpoint.tensors["bridges"] if tensors is None else tensors
    return checkpoint._replace(
        state={**checkpoint.state, "best": [step, objective, start]},
        tensors={**checkpoint.tensors, BEST_FILE: dict(tensors)},
    )
