"""pretrain(): weight-sparse training by itself, from a new or a trained sparse model to a saved and tracked one."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bridges.config import FitConfig
from bridges.data.prepare import FitData, prepare
from bridges.data.random_state import preserve_random_state
from bridges.evaluate import versions
from bridges.fitting.checkpoint import (
    Checkpoint,
    last_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from bridges.fitting.guards import interruptible
from bridges.fitting.identity import RunIdentity, architecture, refuse_other_run, refuse_used_folder
from bridges.fitting.precision import float32_products, refuse_other_mixed_precision
from bridges.fitting.processes import ProcessGroup
from bridges.fitting.tracking import Tracker
from bridges.io.amounts import about, count
from bridges.io.fingerprint import fingerprint
from bridges.io.progress import announce, progress_bar
from bridges.models.loading import as_residual
from bridges.models.modes import frozen, train_mode
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.models.tokens import Batch
from bridges.sparsity.pretraining import Densities, Losses, Pretrainer, Processes, prune_to_start
from bridges.sparsity.settings import PretrainConfig

RESOURCE_SETTINGS = ("checkpoint_every", "log_every")
"""Settings that no result depends on; a run may be resumed with other values of them."""


@torch.inference_mode(False)
@torch.enable_grad()  # a notebook may have switched gradients off
def pretrain(
    sparse: nn.Module | ResidualModel | str | Path,
    data: Any = None,
    *,
    teacher: nn.Module | ResidualModel | str | Path | None = None,
    tokenizer: Any = None,
    eval_data: Any = None,
    config: PretrainConfig | None = None,
    **settings: Any,
) -> SparseTransformer:
    """Train a weight-sparse transformer on next tokens and, with a teacher, on the teacher's predictions.

    Between two moves of the support only nonzeros are multiplied and trained, so the cost of a step follows them. The
    paper's way, a projection after every dense step, is `support="projected"` (paper 2.1; method, section 5).

    Args:
        sparse: the model, new or trained: an object, which is trained in place, a folder or a hub id.
        data: token ids [n, seq]; an iterable of such batches, or of dicts with `input_ids` and `attention_mask`; a path
            to text files; or None for sequences sampled from the teacher.
        teacher: a causal language model with the same tokens, whose KL is a loss.
        tokenizer: turns text into tokens; by default the one saved with a model.
        eval_data: held-out data in the same forms. By default the last 5 % of the rows, or sequences of another seed.
        config: the settings; by default those of `PretrainConfig()`.
        settings: single fields of `PretrainConfig`, which replace those of `config`.

    Returns:
        The trained model, in the mode it was given in. `output_dir` gets it in `sparse/`, beside `metrics.jsonl` and
        `checkpoints/`; the last row of the metrics has the held-out losses.

    Raises:
        ValueError: settings, data and models do not fit together; raised before anything is computed or written.
        OSError: there is no model at a path or hub id.
        FloatingPointError: a loss is not finite.

    >>> import bridges, torch
    >>> model = SparseTransformer(bridges.SparseConfig(vocab_size=32, n_layer=1, d_model=32, block_size=16))
    >>> rows = torch.randint(32, (64, 16), generator=torch.Generator().manual_seed(0))
    >>> trained = pretrain(model, rows, steps=20, start_density=0.2, target_density=0.05, move_every=4, progress=False)
    >>> round(sum(int(p.count_nonzero()) for p in trained.lm_head.parameters()) / trained.lm_head.weight.numel(), 2)
    0.05
    """
    if not isinstance(config, PretrainConfig | None):
        raise ValueError(f"config={config!r} must be a PretrainConfig; single settings are given by name: steps=100")
    config = (config or PretrainConfig()).with_settings(settings)
    if data is None and teacher is None:
        raise ValueError("data=None needs a teacher to sample from; pass token rows or a path to text files")
    if not config.resume:
        refuse_used_folder(config.output_dir)
    refuse_other_mixed_precision(config)
    with float32_products(config.float32_precision) as used, ProcessGroup(config.mixed_precision) as processes:
        config = config.with_settings({"float32_precision": used})
        residual = as_residual(sparse, processes.device)
        model = _trainable(residual.model)
        if config.cuda_graph and (processes.world_size > 1 or model.config.dropout > 0):
            raise ValueError(
                f"cuda_graph=True needs one process and a model without dropout, got {processes.world_size} and "
                f"dropout={model.config.dropout}; leave it out"
            )
        guide = None if teacher is None else as_residual(teacher, processes.device)
        if guide is not None and guide.model is model:
            raise ValueError("teacher and sparse are the same model; a model learns nothing from itself")
        sources = (sparse if teacher is None else teacher, sparse)
        rows = prepare(
            guide or residual,
            residual,
            data,
            eval_data,
            tokenizer,
            sources,
            _data_settings(config, processes),
            processes.world_size,
        )
        with frozen(guide.model) if guide is not None else nullcontext(), train_mode(model):
            return _Run(model, guide, config, processes, rows).finish()


def _trainable(model: nn.Module) -> SparseTransformer:
    if not isinstance(model, SparseTransformer):
        raise ValueError(
            f"sparse={type(model).__name__} must be a SparseTransformer: it is the one whose weights are kept sparse"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("sparse has no parameter with requires_grad, so there is nothing to train")
    return model


def _data_settings(config: PretrainConfig, processes: ProcessGroup) -> FitConfig:
    """What the loading of rows asks of the settings of a fit."""
    names = ("steps", "batch_size", "gradient_accumulation_steps", "seq_len", "seed", "eval_tokens", "progress")
    settings = FitConfig(closed_form=False, **{name: getattr(config, name) for name in names})
    # Sampled rows are to be seen once where that is affordable: a model can learn a few thousand by heart.
    return settings.with_settings({"sampled_rows": max(2, settings.step_rows(processes.world_size))})


@dataclass(frozen=True)
class _Run:
    """One run, from a checkpoint or a fresh start to the saved model."""

    model: SparseTransformer
    teacher: ResidualModel | None
    config: PretrainConfig
    processes: ProcessGroup
    data: FitData

    @cached_property
    def _rows(self) -> FitConfig:
        """What says which rows are taken; made once, since every step asks."""
        return _data_settings(self.config, self.processes)

    def finish(self) -> SparseTransformer:
        """Do what is left of the run."""
        out, processes = self.config.output_dir, self.processes
        data = self.data.fingerprint()
        processes.refuse_unequal("data", data)
        settings = {name: value for name, value in self.config.recorded().items() if name not in RESOURCE_SETTINGS}
        teacher = "" if self.teacher is None else fingerprint(self.teacher.model)
        settings["processes"] = processes.world_size
        dropout, shape = self.model.config.dropout, architecture(self.model)
        identity = RunIdentity(settings, data, teacher, None, versions(), dropout, shape)
        checkpoint = last_checkpoint(out / "checkpoints") if out is not None and self.config.resume else None
        if checkpoint is not None:
            refuse_other_run(checkpoint.state, identity)
        processes.barrier()  # no process may write here before all have looked at what the folder holds
        trainer = self._trainer(checkpoint)
        pending = None if checkpoint is None else checkpoint.tensors["log"]["pending"]
        is_main = processes.is_main
        tracker = Tracker(
            out if is_main else None, self.config.report_to if is_main else "none", identity.to_dict(), trainer.step
        )
        try:
            self._train(trainer, _Log(trainer, tracker, pending), identity)
        except BaseException:
            tracker.abort()
            raise
        if out is not None and is_main:
            self.model.save_pretrained(out / "sparse", sparse=True)
        tracker.finish(None, None)
        processes.barrier()
        return self.model

    def _trainer(self, checkpoint: Checkpoint | None) -> Pretrainer:
        processes = self.processes
        together = Processes(processes.rank, processes.all_reduce, processes.sum_gradients, processes.autocast)
        if checkpoint is None:
            processes.broadcast(self.model.parameters())
            densities = prune_to_start(self.model, self.config)
            return Pretrainer(self.model, self.teacher, self.config, densities, together)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in checkpoint.tensors["sparse"].items():
                parameters[name].copy_(value)
        densities = Densities(*checkpoint.state["densities"])
        masks = checkpoint.tensors.get("supports")
        trainer = Pretrainer(self.model, self.teacher, self.config, densities, together, masks)
        restore_optimizer(trainer.optimizer, checkpoint.tensors["optimizer"])
        trainer.step = checkpoint.step
        return trainer

    def _train(self, trainer: Pretrainer, log: _Log, identity: RunIdentity) -> None:
        config, shown = self.config, self.config.progress and self.processes.is_main
        if shown:
            announce(self._plan(trainer))
        with (
            interruptible() as interrupted,
            preserve_random_state(),
            progress_bar("pretraining", config.steps, shown, trainer.step) as bar,
        ):
            while trainer.step < config.steps:
                log.add(trainer.train_step(self._step_batches(trainer.step + 1)))
                last = trainer.step == config.steps
                evaluates = last or (config.eval_every is not None and trainer.step % config.eval_every == 0)
                evaluated = trainer.evaluate(self._heldout()) if evaluates else {}
                bar.advance(note=log.write(evaluated) if evaluates or trainer.step % config.log_every == 0 else None)
                stop = self._any_process(interrupted.is_set())
                if stop or last or trainer.step % config.checkpoint_every == 0:
                    self._save(trainer, log, identity)
                if stop and not last:
                    raise KeyboardInterrupt

    def _any_process(self, here: bool) -> bool:
        """Whether it holds on any process; one process alone asks nobody, and waits for no device."""
        alone = self.processes.world_size == 1
        return here if alone else self.processes.all_reduce(torch.tensor(float(here))).item() > 0

    def _plan(self, trainer: Pretrainer) -> str:
        """What the run will do."""
        c, (start, target), fitted = self.config, trainer.densities, self.data.fitted
        rows = c.batch_size * c.gradient_accumulation_steps * self.processes.world_size
        left = c.steps - trainer.step
        resumed = f", resumed at step {trainer.step}" if trainer.step else ""
        guide = "no teacher" if self.teacher is None else f"a teacher of {_parameters(self.teacher.model)}"
        lines = (
            f"pretraining: {_parameters(self.model)}, {guide}",
            f"{c.steps} steps of {rows} rows{resumed}: {count(left * rows * fitted.seq_len)} tokens, "
            f"{about(left * self._step_seconds(trainer))} on this machine at the present density",
            f"density: {start:.4g} to {target:.4g} over the first {c.anneal:.0%} of the steps; {c.support} support",
            f"data: {len(fitted)} rows of {fitted.seq_len} tokens, {len(self.data.heldout)} more held out",
        )
        return "\n".join(lines)

    def _step_seconds(self, trainer: Pretrainer) -> float:
        """Seconds of a step between two moves of the support, by running its passes twice and timing the second."""
        batches = self._step_batches(trainer.step + 1)
        with preserve_random_state():
            for _ in range(2):
                started = time.perf_counter()
                trainer.gradients(batches)
                if self.model.device.type == "cuda":
                    torch.cuda.synchronize(self.model.device)
        return time.perf_counter() - started

    def _step_batches(self, step: int) -> list[Batch]:
        return self.data.step_batches(self._rows, step, self.processes.rank, self.processes.world_size)

    def _heldout(self) -> list[Batch]:
        processes = self.processes
        rows = self.data.heldout_rows(self._rows)
        return self.data.heldout_batches(rows, self.config.batch_size, processes.rank, processes.world_size)

    def _save(self, trainer: Pretrainer, log: _Log, identity: RunIdentity) -> None:
        out = self.config.output_dir
        if out is not None and self.processes.is_main:
            tensors = {"sparse": dict(self.model.named_parameters()), "optimizer": optimizer_tensors(trainer.optimizer)}
            tensors["log"] = {"pending": log.pending}
            if trainer.support is not None:
                tensors["supports"] = trainer.support.masks
            state = {**identity.to_dict(), "densities": list(trainer.densities)}
            save_checkpoint(out / "checkpoints", Checkpoint(trainer.step, state, tensors))
        self.processes.barrier()


class _Log:
    """Adds up the losses of steps on their device, and makes rows of their means."""

    def __init__(self, trainer: Pretrainer, tracker: Tracker, pending: Tensor | None):
        self._trainer, self._tracker = trainer, tracker
        self.pending = torch.zeros(3, dtype=torch.float64) if pending is None else pending
        """Summed cross-entropy, summed KL and the number of steps since the last row; a checkpoint holds it."""
        self._started, self._steps = time.perf_counter(), 0

    def add(self, losses: Losses) -> None:
        """Add a step's losses."""
        step = torch.stack([losses.ce, losses.kl, torch.ones_like(losses.ce)])
        self.pending = self.pending.to(step.device) + step
        self._steps += 1

    def write(self, evaluated: dict[str, float]) -> str:
        """Write a row of the mean losses since the last one, and return it in short.

        Raises FloatingPointError if they are not finite.
        """
        trainer, config = self._trainer, self._trainer.config
        ce, kl = (self.pending[:2] / self.pending[2]).tolist()
        total = config.ce_weight * ce + config.kl_weight * kl
        if not math.isfinite(total):
            raise FloatingPointError(
                f"step {trainer.step}: the loss is {total} (cross-entropy {ce}, KL {kl}); the last checkpoint is kept. "
                "Lower lr, or look for tokens that make a model overflow"
            )
        seconds = time.perf_counter() - self._started
        row = {"step": trainer.step, "train/loss": total, "train/ce": ce}
        row |= {} if trainer.teacher is None else {"train/kl": kl}
        row |= {"kept_fraction": trainer.kept(trainer.step), "lr": trainer.learning_rate(trainer.step), **evaluated}
        row["steps_per_second"] = round(self._steps / seconds, 3)
        self.pending = torch.zeros_like(self.pending)
        self._started, self._steps = time.perf_counter(), 0
        self._tracker.log(row)
        return f"ce {ce:.3f} kl {kl:.3f} kept {row['kept_fraction']:.4f}"


def _parameters(model: nn.Module) -> str:
    return f"{count(sum(p.numel() for p in model.parameters()))} parameters"
