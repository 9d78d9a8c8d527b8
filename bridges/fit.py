"""fit(): bridges between two models, from closed form to saved, measured, tracked bridges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from bridges.bridge import Bridge, BridgeSet
from bridges.bridge_report import BridgeReport
from bridges.config import FitConfig
from bridges.data.prepare import Prepared, prepare
from bridges.evaluate import measure, versions
from bridges.fitting.checkpoint import Checkpoint, last_checkpoint
from bridges.fitting.closed_form import measure_read_scales, solve_bridges
from bridges.fitting.gradients import StepLosses, trained_parameters
from bridges.fitting.identity import RunIdentity, refuse_other_run, refuse_used_folder
from bridges.fitting.plan import describe
from bridges.fitting.tracking import SENT, Tracker
from bridges.fitting.trainer import Processes, Trainer, checkpoint_saver, train
from bridges.models.loading import as_residual, load_model
from bridges.models.modes import frozen, train_mode
from bridges.models.pairing import pair_sites
from bridges.models.residual import Batch, ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.objective.hybrid import SIDES, ModelPair
from bridges.report.plots import quality_plot
from bridges.sparsity.support import use_sparse_kernels

RMS_TOKENS = 65_536
"""Tokens over which R of the interventions is measured."""


@torch.inference_mode(False)
@torch.enable_grad()  # a notebook may have switched gradients off
def fit(
    dense: nn.Module | str | Path,
    sparse: nn.Module | str | Path,
    data: Any = None,
    *,
    tokenizer: Any = None,
    eval_data: Any = None,
    config: FitConfig | None = None,
    **settings: Any,
) -> BridgeSet:
    """Fit bridges between two models: the closed form, then gradient steps on the full objective (method, 2 and 3).

    `dense`, `sparse`: model objects, which stay on their devices, or paths or hub ids. `data`: [n, seq] tokens, an
    iterable of batches, a path to text files with `tokenizer`, or None for sequences sampled from the dense model;
    without `eval_data` its last 5 % of rows are held out. `settings` are fields of `FitConfig` and go before `config`.

    Returns the bridges with `report` (held-out) and `history`. Models are left as they were, but for the weights of a
    sparse model that trains. ValueError for input that cannot be, before anything is computed or written;
    FloatingPointError if a loss is not finite.
    """
    if not isinstance(config, FitConfig | None):
        raise ValueError(f"config={config!r} must be a FitConfig; single settings are given by name: fit(..., steps=0)")
    config = (config or FitConfig()).with_settings(settings)
    if not config.resume:
        refuse_used_folder(config.output_dir)
    with Processes(config.mixed_precision) as processes:
        return _fit(dense, sparse, data, tokenizer, eval_data, config, processes)


def _fit(
    dense: Any, sparse: Any, data: Any, tokenizer: Any, eval_data: Any, config: FitConfig, processes: Processes
) -> BridgeSet:
    dense_model, sparse_model = (load_model(source, processes.device) for source in (dense, sparse))
    if config.train_sparse and not isinstance(sparse_model, SparseTransformer):
        raise ValueError(
            f"sparse={type(sparse_model).__name__}: train_sparse=True needs a SparseTransformer; "
            "leave train_sparse off to bridge to any frozen model"
        )
    if config.train_sparse and not any(p.requires_grad for p in sparse_model.parameters()):
        raise ValueError("sparse has no parameter with requires_grad, so train_sparse=True has nothing to train")
    held: AbstractContextManager = (train_mode if config.train_sparse else frozen)(sparse_model)
    thin = isinstance(sparse_model, SparseTransformer) and not config.train_sparse
    with frozen(dense_model), held, use_sparse_kernels(sparse_model) if thin else nullcontext():
        pair = _untrained_pair(as_residual(dense_model), as_residual(sparse_model), config)
        for i in range(len(pair.bridge_set)):  # a norm that R cannot be measured for is refused before the work
            for side in SIDES:
                pair.model(side).norm(pair.site(side, i))
        sources, count = (dense, sparse), processes.count
        prepared = prepare(pair.dense, pair.sparse, data, eval_data, tokenizer, sources, config, count)
        return _Run(pair, config, processes, prepared).finish()


@dataclass
class _Run:
    """One run, from checkpoint or closed form to the saved folder."""

    pair: ModelPair
    config: FitConfig
    processes: Processes
    data: Prepared

    def finish(self) -> BridgeSet:
        bridge_set, out = self.pair.bridge_set, self.config.output_dir
        data = self.data.fingerprint()
        self.processes.refuse_unequal("data", data)
        identity = RunIdentity.of(self.pair, self.config, data, versions(), self.processes.count)
        checkpoint = last_checkpoint(out / "checkpoints") if out is not None and self.config.resume else None
        if checkpoint is not None:
            refuse_other_run(checkpoint.state, identity)
        self.processes.wait()  # no process may write here before all have looked at what the folder holds
        trainer = Trainer(self.pair, self.config, self.processes)
        if checkpoint is not None and out is not None and (out / "config.json").is_file():
            trainer.restore(checkpoint)
            finished = BridgeSet.from_pretrained(out)
            if self.config.report_to == "wandb" and not (out / SENT).is_file():
                self._tracker(identity, checkpoint).finish(finished.report, out, out / "quality.png")
            return finished
        tracker = self._tracker(identity, checkpoint)
        try:
            self._train(trainer, tracker, checkpoint, identity)
            self._measure(identity)
        except BaseException:
            tracker.abort()
            raise
        bridge_set.history = tracker.rows
        self._save(tracker)
        return bridge_set

    def _tracker(self, identity: RunIdentity, checkpoint: Checkpoint | None) -> Tracker:
        main = self.processes.main
        step = 0 if checkpoint is None else checkpoint.step
        return Tracker(
            self.config.output_dir if main else None,
            self.config.report_to if main else "none",
            identity.to_dict() | {"sites": self.pair.bridge_set.sites},
            step,
        )

    def _train(self, trainer: Trainer, tracker: Tracker, checkpoint: Checkpoint | None, identity: RunIdentity) -> None:
        out = self.config.output_dir
        folder = None if out is None else out / "checkpoints"
        save = checkpoint_saver(trainer, folder, identity.to_dict())
        self._announce()
        if checkpoint is None:
            self._start(trainer)
            save()
        else:
            trainer.restore(checkpoint)
        self.processes.share(trained_parameters(self.pair, self.config.train_sparse))
        with self._progress() as bar:
            task = bar.add_task("fit", total=self.config.steps, completed=trainer.step, losses="")

            def advance(losses: StepLosses) -> None:
                bar.update(task, advance=1, losses=_summary(losses))

            train(trainer, self._batches, tracker, save, self._evaluate, advance)

    def _start(self, trainer: Trainer) -> None:
        """The closed form, or random maps drawn by the seed."""
        config, processes = self.config, self.processes
        if config.closed_form:
            batches = self.data.closed_form_batches(config, processes.index, processes.count)
            with processes.autocast():
                trainer.carried = solve_bridges(
                    self.pair,
                    lambda: batches,
                    config.ridge,
                    config.moments_gib * 2**30,
                    processes.reduce,
                    processes.main,
                    **self._interchange(),
                )
        else:
            generator = torch.Generator().manual_seed(config.seed)
            for bridge in self.pair.bridge_set:
                bridge.randomize(generator)

    def _interchange(self) -> dict[str, Any]:
        """What the closed form needs for the interchange loss, nothing where that is off."""
        if self.config.interchange_weight == 0:
            return {}
        pairs = self.data.pair_batches(self.config, self.processes.index, self.processes.count)
        return {"pairs": lambda: pairs, "carried_weight": self.config.interchange_weight / self.config.nmse_weight}

    def _batches(self, step: int) -> list[Batch]:
        return self.data.step_batches(self.config, step, self.processes.index, self.processes.count)

    def _evaluate(self) -> BridgeReport:
        batches, shared = self.data.heldout_batches(self.config, self.processes.index, self.processes.count)
        kwargs = {"reduce": self.processes.reduce} if shared else {}
        return measure(self.pair, batches, settings=self.config.recorded(), **kwargs)

    def _measure(self, identity: RunIdentity) -> None:
        """What a finished set carries: R on both sides, provenance, the held-out report."""
        bridge_set, config = self.pair.bridge_set, self.config
        with frozen(self.pair.sparse.model):
            rows = min(len(self.data.train), math.ceil(RMS_TOKENS / self.data.train.seq_len))
            size = config.batch_size
            batches = [self.data.train.take(i, min(size, rows - i)) for i in range(0, rows, size)]
            measure_read_scales(self.pair, batches)
            bridge_set.report = self._evaluate()
        bridge_set.remember(self.pair.dense.model, self.pair.sparse.model)
        bridge_set.provenance |= {"fit": config.recorded(), "versions": identity.versions}

    def _save(self, tracker: Tracker) -> None:
        out, bridge_set = self.config.output_dir, self.pair.bridge_set
        if self.processes.main:
            plot = None
            if out is not None:
                if self.config.train_sparse:
                    self.pair.sparse.model.save_pretrained(out / "sparse", sparse=True)  # pyright: ignore
                plot = quality_plot(bridge_set.report, out / "quality.png") if bridge_set.report else None
                bridge_set.save_pretrained(out)
            tracker.finish(bridge_set.report, out, plot)
        self.processes.wait()

    def _announce(self) -> None:
        if self.config.progress and self.processes.main:
            rows, heldout = self.data.train, self.data.heldout
            text = describe(self.pair, self.config, len(rows), rows.seq_len, len(heldout), self.processes.count)
            Console(stderr=True).print(text, highlight=False, soft_wrap=True)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=Console(stderr=True),
            disable=not (self.config.progress and self.processes.main) or self.config.steps == 0,
        )


def _summary(losses: StepLosses) -> str:
    def mean(values: dict[str, float]) -> float:
        return sum(values.values()) / len(values)

    text = f"loss {losses.loss:.3f} nmse {mean(losses.nmse_encode):.2f}/{mean(losses.nmse_decode):.2f} "
    text += f"kl {mean(losses.kl_dense_to_sparse):.2f}/{mean(losses.kl_sparse_to_dense):.2f}"
    return text if losses.ce is None else f"{text} ce {losses.ce:.2f}"


def _untrained_pair(dense: ResidualModel, sparse: ResidualModel, config: FitConfig) -> ModelPair:
    """Bridges of zeros between the paired sites, in the promoted dtype of both models, at least float32."""
    if dense.vocab_size != sparse.vocab_size:
        raise ValueError(
            f"dense and sparse have different vocabularies, {dense.vocab_size} and {sparse.vocab_size} tokens; "
            "bridges need one tokenizer for both"
        )
    pairs = pair_sites(dense, sparse, config.site_map, config.sites)
    dtype = torch.promote_types(torch.promote_types(dense.dtype, sparse.dtype), torch.float32)
    k = config.k or _default_k(sparse)
    if k > sparse.d_model:
        raise ValueError(f"k={k} is over the sparse model's width {sparse.d_model}")
    bridges: Sequence[Bridge] = [Bridge(dense.d_model, sparse.d_model, k, dtype) for _ in pairs]
    bridge_set = BridgeSet([(p.dense, p.sparse) for p in pairs], list(bridges)).to(dense.device)
    return ModelPair(dense, sparse, bridge_set)


def _default_k(sparse: ResidualModel) -> int:
    kept = sparse.model.config.kept("attn_in") if isinstance(sparse.model, SparseTransformer) else None
    return min(kept or max(1, sparse.d_model // 4), sparse.d_model)
