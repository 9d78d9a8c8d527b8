"""The training loop: steps, optimisers, schedules, checkpoints, and the processes that share the work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import reduce as accelerate_reduce
from torch import Tensor

from bridges.bridge_report import BridgeReport
from bridges.config import FitConfig
from bridges.fitting.checkpoint import (
    Checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from bridges.fitting.gradients import Objective, StepLosses, Weights, step_gradients
from bridges.fitting.guards import interruptible, refuse_not_finite, refuse_not_finite_gradients
from bridges.fitting.interchange import Carried
from bridges.fitting.tracking import Tracker
from bridges.models.residual import Batch
from bridges.objective.hybrid import ModelPair
from bridges.sparsity import projection as sparsity
from bridges.sparsity.support import Support

FP16_LOSS_SCALE = 1024.0


class Processes:
    """The processes of a run, through accelerate: who this one is, sums over all, and autocast."""

    def __init__(self, mixed_precision: str = "no"):
        # accelerate's state is a singleton, and the user's own Accelerator may live beside or come after this one.
        self._before = dict(AcceleratorState._shared_state)
        if self._before and AcceleratorState().mixed_precision != mixed_precision:
            AcceleratorState._reset_state()
        self.accelerator = Accelerator(mixed_precision=mixed_precision)
        self.count: int = self.accelerator.num_processes
        self.index: int = self.accelerator.process_index
        self.main: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: Any) -> None:
        """Leave accelerate's state as it was before."""
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(self._before)

    @torch.no_grad()
    def share(self, tensors: Iterable[Tensor]) -> None:
        """The main process's values on every process: an unseeded model, or another solver, may have made others."""
        for tensor in tensors if self.count > 1 else ():
            tensor.copy_(self.reduce(tensor.detach() if self.main else torch.zeros_like(tensor)))

    def refuse_unequal(self, name: str, digest: str) -> None:
        """ValueError unless every process has the same hexadecimal `digest`."""
        mine = int(digest[:8], 16)
        total = self.reduce(torch.tensor(float(mine), dtype=torch.float64)).item()
        # All or none must raise, or the others would wait for ever.
        unequal = self.reduce(torch.tensor(float(total != self.count * mine), dtype=torch.float64)).item()
        if unequal:
            raise ValueError(f"{name} differs between processes; seed its order, so that every process reads the same")

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over processes, on the tensor's own device."""
        if self.count == 1:
            return tensor
        summed = accelerate_reduce(tensor.to(self.device), "sum")
        return summed.to(tensor.device)  # pyright: ignore[reportAttributeAccessIssue]

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()

    def autocast(self) -> AbstractContextManager:
        """Mixed precision, nothing where it is off."""
        return nullcontext() if self.accelerator.mixed_precision == "no" else self.accelerator.autocast()


class Trainer:
    """Gradient steps on the full objective; `state` and `restore` make every step one that a run can resume from."""

    def __init__(self, pair: ModelPair, config: FitConfig, processes: Processes):
        self.pair, self.config, self.processes = pair, config, processes
        self.step = 0
        self.bridge_optimizer = torch.optim.AdamW(pair.bridge_set.parameters(), lr=config.lr, weight_decay=0.0)
        self.carried: list[Carried] = []
        """What the interchange loss asks of every site, found with the closed form; empty without that loss."""
        self._supports: dict[str, Tensor] | None = None

    @cached_property
    def support(self) -> Support | None:
        """The nonzeros that alone train, where the zeros of the start are kept.

        Made when the first step or checkpoint needs it: it copies the weights, which a restored run or the main
        process may still replace.
        """
        if not self.config.train_sparse or self.config.target_density is not None:
            return None
        model = self.pair.sparse.model
        masks = sparsity.supports(model) if self._supports is None else self._supports
        return Support(model, masks, fast=self.config.mixed_precision == "no")

    @cached_property
    def sparse_optimizer(self) -> torch.optim.AdamW | None:
        """Of the sparse model, where it trains."""
        if not self.config.train_sparse:
            return None
        trained = [p for p in self.pair.sparse.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(
            trained if self.support is None else self.support.parameters(),
            lr=self.config.sparse_lr,
            betas=(0.9, 0.95),
            eps=self.config.sparse_eps,
            weight_decay=self.config.sparse_weight_decay,
        )

    @cached_property
    def objective(self) -> Objective:
        """The loss weights and how gradients are made."""
        c = self.config
        return Objective(
            Weights(
                c.nmse_weight,
                c.kl_dense_to_sparse_weight,
                c.kl_sparse_to_dense_weight,
                c.ce_weight,
                c.interchange_weight,
            ),
            c.train_sparse,
            self.processes.reduce,
            self.processes.autocast,
            FP16_LOSS_SCALE if c.mixed_precision == "fp16" else 1.0,
            self.carried if self.processes.main else (),  # gradients are summed over processes
        )

    def sampled_sites(self, step: int) -> list[int]:
        """The sites whose hybrid passes run in a step: drawn evenly by seed and step, the same on every process."""
        n = len(self.pair.bridge_set)
        count = n if self.config.sites_per_step == "all" else min(self.config.sites_per_step, n)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        return sorted(torch.randperm(n, generator=generator)[:count].tolist())

    def train_step(self, batches: Sequence[Batch]) -> StepLosses:
        """One step on this process's micro-batches; FloatingPointError, nothing changed, if figures are not finite."""
        step = self.step + 1
        # Dropout is the only other user of randomness; seeded by the step, a resumed run draws what the first one did.
        torch.manual_seed((self.config.seed * 1_000_003 + step) * 1009 + self.processes.index)
        self._zero_grad()
        with nullcontext() if self.support is None else self.support.multiplying():
            losses = step_gradients(self.pair, batches, self.sampled_sites(step), self.objective)
        refuse_not_finite(losses, step)
        if self.support is not None:
            self.support.gather_gradients()
        self._sum_gradients()
        refuse_not_finite_gradients(self._parameters(), step)
        self.bridge_optimizer.param_groups[0]["lr"] = self.config.lr * (1 - self.step / self.config.steps)
        self.bridge_optimizer.step()
        if self.sparse_optimizer is not None:
            self._sparse_step(self.sparse_optimizer, step)
        self.step = step
        return losses

    def kept_fraction(self, step: int) -> float:
        """Part of the sparse model's weights kept after a step."""
        c = self.config
        if c.target_density is None:
            return 1.0
        return sparsity.kept_fraction(step, c.steps, c.target_density, c.anneal, c.start_density)

    def state(self) -> Checkpoint:
        """Everything that the next step depends on."""
        tensors = {
            "bridges": self.pair.bridge_set.tensors(),
            "bridge_optimizer": optimizer_tensors(self.bridge_optimizer),
        }
        if self.carried:
            sites = zip(self.pair.bridge_set.sites, self.carried, strict=True)
            tensors["carried"] = {f"{s}.{name}": t for s, one in sites for name, t in one._asdict().items()}
        if self.sparse_optimizer is not None:
            tensors["sparse"] = dict(self.pair.sparse.model.named_parameters())
            tensors["sparse_optimizer"] = optimizer_tensors(self.sparse_optimizer)
            tensors["supports"] = {} if self.support is None else self.support.masks
        return Checkpoint(self.step, {}, {name: t for name, t in tensors.items() if t})

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint."""
        self.step = checkpoint.step
        for name, tensor in self.pair.bridge_set.tensors().items():
            tensor.copy_(checkpoint.tensors["bridges"][name])
        if carried := checkpoint.tensors.get("carried"):
            device = self.pair.dense.device
            stored = {name: tensor.to(device) for name, tensor in carried.items()}
            names = [[f"{site}.{name}" for name in Carried._fields] for site in self.pair.bridge_set.sites]
            self.carried = [Carried(*(stored[name] for name in of_site)) for of_site in names]
            vars(self).pop("objective", None)
        restore_optimizer(self.bridge_optimizer, checkpoint.tensors.get("bridge_optimizer", {}))
        if self.config.train_sparse:
            for name, parameter in self.pair.sparse.model.named_parameters():
                parameter.copy_(checkpoint.tensors["sparse"][name])
            self._supports = checkpoint.tensors.get("supports")
            vars(self).pop("support", None)
            vars(self).pop("sparse_optimizer", None)
        if self.sparse_optimizer is not None:
            restore_optimizer(self.sparse_optimizer, checkpoint.tensors.get("sparse_optimizer", {}))

    def _parameters(self) -> Iterator[Tensor]:
        for optimizer in (self.bridge_optimizer, self.sparse_optimizer):
            if optimizer is not None:
                yield from optimizer.param_groups[0]["params"]

    def _zero_grad(self) -> None:
        for parameter in self._parameters():
            parameter.grad = None

    def _sum_gradients(self) -> None:
        """Sum gradients over processes, one reduction per dtype and device."""
        if self.processes.count == 1:
            return
        grads = [p.grad for p in self._parameters() if p.grad is not None]
        for key in dict.fromkeys((g.dtype, g.device) for g in grads):  # in one order on every process
            group = [g for g in grads if (g.dtype, g.device) == key]
            summed = self.processes.reduce(torch.cat([g.flatten() for g in group]))
            for grad, part in zip(group, summed.split([g.numel() for g in group]), strict=True):
                grad.copy_(part.view(grad.shape))

    def _sparse_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        config, kept = self.config, self.kept_fraction(step)
        optimizer.param_groups[0]["lr"] = sparsity.learning_rate(
            step, config.steps, config.sparse_lr, kept=kept, target=config.target_density or kept
        )
        sparsity.clip_to_rms(optimizer.param_groups[0]["params"])
        optimizer.step()
        if self.support is not None:
            self.support.scatter()
        elif config.target_density is not None:
            sparsity.project(self.pair.sparse.model, kept)


def train(
    trainer: Trainer,
    batches: Callable[[int], Sequence[Batch]],
    tracker: Tracker | None,
    save: Callable[[], Any],
    evaluate: Callable[[], BridgeReport],
    advance: Callable[[StepLosses], Any] = lambda losses: None,
) -> None:
    """Run the steps that are left. `batches(step)` gives this process's micro-batches, steps counted from 1.

    Ctrl-C (or SIGTERM) ends the run after the step in hand, with a checkpoint; a second Ctrl-C ends it at once.
    Global random state is left as it was.
    """
    config, processes = trainer.config, trainer.processes
    device = trainer.pair.sparse.device
    cuda = [device] if device.type == "cuda" else []
    with interruptible() as interrupted, torch.random.fork_rng(devices=cuda):
        while trainer.step < config.steps:
            started = time.perf_counter()
            losses = trainer.train_step(batches(trainer.step + 1))
            row: dict[str, Any] = {"step": trainer.step, **losses.row()}
            row["tokens_per_second"] = round(losses.tokens / (time.perf_counter() - started), 1)
            row["lr"] = trainer.bridge_optimizer.param_groups[0]["lr"]
            if config.train_sparse:
                row["kept_fraction"] = trainer.kept_fraction(trainer.step)
            if config.eval_every and trainer.step % config.eval_every == 0:
                row |= evaluate().flat()
            if tracker is not None:
                tracker.log(row)
            advance(losses)
            stop = processes.reduce(torch.tensor(float(interrupted.is_set()))).item() > 0
            if stop or trainer.step % config.checkpoint_every == 0 or trainer.step == config.steps:
                save()
            if stop:
                raise KeyboardInterrupt


def checkpoint_saver(trainer: Trainer, folder: Path | None, state: dict[str, Any]) -> Callable[[], None]:
    """A function that saves the trainer's present state from the main process, and waits for it on the others."""

    def save() -> None:
        if folder is not None and trainer.processes.main:
            save_checkpoint(folder, trainer.state()._replace(state=state))
        trainer.processes.wait()

    return save
