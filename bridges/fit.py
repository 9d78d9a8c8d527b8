"""fit(): bridges between two models, from the closed form to saved, measured and tracked bridges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.bridge_report import BridgeReport
from bridges.config import FitConfig
from bridges.data.prepare import FitData, prepare
from bridges.evaluate import affordable_kl_rows, measure, versions
from bridges.fitting.channel_effects import EFFECT_TOKENS, decoder_freedoms
from bridges.fitting.checkpoint import Checkpoint, last_checkpoint
from bridges.fitting.closed_form import ReadScales, measure_read_scales, site_groups, solve_bridges, standardize
from bridges.fitting.gradients import trained_parameters
from bridges.fitting.guards import warn_of_poor_sites
from bridges.fitting.identity import RunIdentity, refuse_other_run, refuse_used_folder
from bridges.fitting.massive import SAMPLED_TOKENS, set_norm_limits
from bridges.fitting.plan import Work, describe, estimate_seconds
from bridges.fitting.precision import float32_products, refuse_other_mixed_precision
from bridges.fitting.processes import ProcessGroup
from bridges.fitting.progress import summary
from bridges.fitting.selection import TOKENS as SELECTION_TOKENS
from bridges.fitting.selection import BestState, Selection
from bridges.fitting.sparse_training import prune_to_start
from bridges.fitting.standardized import StandardizedBridges
from bridges.fitting.start import StartState, start_from_checkpoint
from bridges.fitting.tracking import REPORT_SENT_FILE, Tracker
from bridges.fitting.trainer import Trainer, checkpoint_saver, train
from bridges.fitting.untrained import untrained_pair
from bridges.io.progress import announce, progress_bar
from bridges.models.loading import as_residual
from bridges.models.modes import frozen, train_mode
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.models.tokens import Batch
from bridges.objective.pair import SIDES, ModelPair, Side
from bridges.sparsity.support import use_sparse_kernels

READ_SCALE_TOKENS = 16_384
"""Tokens over which R, the mean RMS that edits are scaled by, is measured where the closed form does not measure it."""
RIDGE_SHARE, JUDGED_SHARE = 2, 8
"""Ridge penalties are chosen on one token for every two that the closed form is solved from; a given penalty needs
one for every eight, to judge whether massive tokens are fitted to."""
STANDARDIZATION_TOKENS = 8192
"""Tokens that the streams' means and standard deviations come from where there is no closed form."""


@torch.inference_mode(False)
@torch.enable_grad()  # a notebook may have switched gradients off
def fit(
    dense: nn.Module | ResidualModel | str | Path,
    sparse: nn.Module | ResidualModel | str | Path,
    data: Any = None,
    *,
    tokenizer: Any = None,
    eval_data: Any = None,
    config: FitConfig | None = None,
    **settings: Any,
) -> BridgeSet:
    """Fit bridges between two models: the closed form, then gradient steps on the full objective.

    The objective is that of the paper (A.3; method, section 2), the closed form is ridge regression (method, 3).

    Args:
        dense: a causal language model: a model object, a `ResidualModel`, a folder or a hub id. Objects stay on their
            devices; what is loaded goes to accelerate's device.
        sparse: the weight-sparse model, given in the same ways; any model will do unless `train_sparse` is set.
        data: token ids [n, seq]; an iterable of such batches, or of dicts with `input_ids` and `attention_mask`; a path
            to text files; or None for sequences sampled from the dense model.
        tokenizer: turns text into tokens; by default the one saved with a model.
        eval_data: held-out data in the same forms. By default the last 5 % of the rows, or sequences of another seed.
        config: the settings; by default those of `FitConfig()`.
        settings: single fields of `FitConfig`, which replace those of `config`.

    Returns:
        The bridges, on the dense model's device, with `report` (held-out figures) and `history` (the logged rows). Both
        models are left as they were, but for the weights of a sparse model that trains.

    Raises:
        ValueError: settings, data and models do not fit together; raised before anything is computed or written.
        OSError: there is no model at a path or hub id.
        FloatingPointError: a stream, a loss or a gradient is not finite.

    >>> import bridges, torch
    >>> pair = bridges.load_pair()
    >>> rows = torch.randint(1024, (16, 16), generator=torch.Generator().manual_seed(0))
    >>> bridge_set = bridges.fit(pair.dense, pair.sparse, rows, sites=("0.mlp",), steps=0, progress=False)
    >>> bridge_set.sites, bridge_set.report.tokens
    (['0.mlp'], 16)
    """
    if not isinstance(config, FitConfig | None):
        raise ValueError(f"config={config!r} must be a FitConfig; single settings are given by name: fit(..., steps=0)")
    config = (config or FitConfig()).with_settings(settings)
    if not config.resume:
        refuse_used_folder(config.output_dir)
    refuse_other_mixed_precision(config)
    with float32_products(config.float32_precision) as used, ProcessGroup(config.mixed_precision) as processes:
        config = config.with_settings({"float32_precision": used})
        models = as_residual(dense, processes.device), as_residual(sparse, processes.device)
        _refuse_untrainable(models[1].model, config)
        for model in models if config.steps else ():
            model.check_differentiable()
        with frozen(models[0].model), sparse_modes(models[1].model, config):
            pair = untrained_pair(*models, config)
            data = prepare(
                pair.dense, pair.sparse, data, eval_data, tokenizer, (dense, sparse), config, processes.world_size
            )
            return _Run(pair, config, processes, data).finish()


def _refuse_untrainable(sparse: nn.Module, config: FitConfig) -> None:
    """ValueError if the sparse model is to train and cannot."""
    if config.train_sparse and not isinstance(sparse, SparseTransformer):
        raise ValueError(
            f"sparse={type(sparse).__name__}: train_sparse=True needs a SparseTransformer; "
            "leave train_sparse off to bridge to any frozen model"
        )
    if config.train_sparse and not any(p.requires_grad for p in sparse.parameters()):
        raise ValueError("sparse has no parameter with requires_grad, so train_sparse=True has nothing to train")


@contextmanager
def sparse_modes(sparse: nn.Module, config: FitConfig) -> Iterator[None]:
    """Inside, the sparse model trains, or is frozen and multiplies by its nonzeros alone where that is faster."""
    with train_mode(sparse) if config.train_sparse else frozen(sparse):
        fast = isinstance(sparse, SparseTransformer) and not config.train_sparse
        with use_sparse_kernels(sparse) if fast else nullcontext():
            yield


@dataclass(frozen=True)
class _Run:
    """One run, from a checkpoint or a fresh start to the saved folder."""

    pair: ModelPair
    config: FitConfig
    processes: ProcessGroup
    data: FitData
    selected: list[BestState] = field(default_factory=list)
    """The state that is returned, once the steps are done; empty where that is the last."""

    @property
    def _shown(self) -> bool:
        """Whether this process shows plan and progress."""
        return self.config.progress and self.processes.is_main

    def finish(self) -> BridgeSet:
        """Do what is left of the run; the bridge set with its report and history."""
        out, processes = self.config.output_dir, self.processes
        data = self.data.fingerprint()
        processes.refuse_unequal("data", data)
        identity = RunIdentity.of(self.pair, self.config, data, versions(), processes.world_size)
        checkpoint = last_checkpoint(out / "checkpoints") if out is not None and self.config.resume else None
        if checkpoint is not None:
            refuse_other_run(checkpoint.state, identity)
        processes.barrier()  # no process may write here before all have looked at what the folder holds
        if checkpoint is not None and out is not None and (out / "config.json").is_file():
            return self._finished(checkpoint, identity, out)
        tracker = self._tracker(identity, checkpoint)
        try:
            self._train(tracker, checkpoint, identity)
            self._measure(identity)
        except BaseException:
            tracker.abort()
            raise
        self.pair.bridge_set.history = tracker.rows
        self._save(tracker)
        return self.pair.bridge_set

    def _finished(self, checkpoint: Checkpoint, identity: RunIdentity, out: Path) -> BridgeSet:
        """The result of a run that had finished before, with the sparse model as it was trained."""
        start_from_checkpoint(self.pair, checkpoint)
        bridge_set = BridgeSet.from_pretrained(out).to(self.pair.dense.device)
        if self.config.report_to == "wandb" and not (out / REPORT_SENT_FILE).is_file():
            self._tracker(identity, checkpoint).finish(bridge_set.report, out, out / "quality.png")
        return bridge_set

    def _tracker(self, identity: RunIdentity, checkpoint: Checkpoint | None) -> Tracker:
        """The tracker of this process; those of other processes than the main one write and send nothing."""
        is_main = self.processes.is_main
        return Tracker(
            self.config.output_dir if is_main else None,
            self.config.report_to if is_main else "none",
            identity.to_dict() | {"sites": self.pair.bridge_set.sites},
            0 if checkpoint is None else checkpoint.step,
        )

    def _train(self, tracker: Tracker, checkpoint: Checkpoint | None, identity: RunIdentity) -> None:
        config, processes = self.config, self.processes
        if self._shown:
            announce(self._plan(None if checkpoint is None else checkpoint.step))
        provenance = self.pair.bridge_set.provenance
        if checkpoint is None:
            prune_to_start(self.pair.sparse.model, config)
            start = self._start()
        else:
            start = start_from_checkpoint(self.pair, checkpoint)
            provenance |= checkpoint.state.get("start", {})
        processes.broadcast(trained_parameters(self.pair, config.train_sparse))
        trainer = Trainer(self.pair, config, processes, start)
        selection = self._selection(trainer, start)
        folder = None if config.output_dir is None else config.output_dir / "checkpoints"
        # What `_start` has noted of the closed form goes with every checkpoint.
        save = checkpoint_saver(trainer, folder, {**identity.to_dict(), "start": dict(provenance)}, selection)
        if checkpoint is None:
            save()
        with progress_bar("gradient steps", config.steps, self._shown and config.steps > 0, trainer.step) as bar:
            train(
                trainer,
                self._step_batches,
                tracker,
                save,
                self._evaluate,
                lambda losses: bar.advance(note=summary(losses)),
                selection,
            )
        if selection is not None and selection.best is not None:
            self.selected.append(selection.best)

    def _plan(self, steps_done: int | None) -> str:
        """What the run will do and how long it takes, by timing a small part of it; None: it starts anew."""
        config, rows = self.config, self.data.fitted
        start_rows = 0
        if config.closed_form and steps_done is None:
            tokens = config.closed_form_tokens_for(max(self.pair.dense.d_model, self.pair.sparse.d_model))
            start_rows = self.data.start_rows(tokens, self._judging(tokens))
        evaluations = 1
        if config.eval_every:
            evaluations += config.steps // config.eval_every - (steps_done or 0) // config.eval_every
        work = Work(
            *(len(rows), rows.seq_len, *self._heldout_rows(), start_rows, evaluations, self.processes.world_size),
            real_share=rows.real_tokens.sum().item() / rows.input_ids.numel(),
            standardization_tokens=STANDARDIZATION_TOKENS,
            read_scale_tokens=READ_SCALE_TOKENS,
            steps_done=steps_done,
        )
        seconds = estimate_seconds(self.pair, config, work, rows.batch(0, config.batch_size), self.processes.autocast)
        return describe(self.pair, config, work, seconds)

    def _judging(self, tokens: int) -> int:
        """Tokens set aside that judge a closed form of so many tokens."""
        return tokens // (RIDGE_SHARE if self.config.ridge == "auto" else JUDGED_SHARE)

    def _selection(self, trainer: Trainer, start: StartState) -> Selection | None:
        """None without steps, and where the sparse model trains: an earlier state of it is not what was asked for."""
        if not self.config.steps or self.config.train_sparse:
            return None
        batches = self._selection_batches(SELECTION_TOKENS)
        return Selection(self.pair, batches, trainer.objective, start.best)

    def _start(self) -> StartState:
        """Set the bridges to the closed form, or to random maps drawn by the seed."""
        config, processes = self.config, self.processes
        with processes.autocast():
            self._set_norm_limits(("dense",) if config.train_sparse else SIDES)
            if not config.closed_form:
                return self._random_start()
            tokens = config.closed_form_tokens_for(max(self.pair.dense.d_model, self.pair.sparse.d_model))
            batches, selection = self._train_batches(tokens), self._ridge_batches(self._judging(tokens))
            scales = None if config.train_sparse else ReadScales(self.pair)
            freedom = None if config.decoder_attribution == "equal" else self._decoder_freedom()
            groups = len(list(site_groups(self.pair, config.moments_bytes)))
            total = groups * (len(batches) + len(selection))
            with progress_bar("closed form, batches and sites", total + len(self.pair.bridge_set), self._shown) as bar:
                found = solve_bridges(
                    self.pair,
                    batches,
                    config.ridge,
                    config.moments_bytes,
                    processes.all_reduce,
                    selection=selection,
                    read_scales=scales,
                    decoder_freedom=freedom,
                    advance=bar.advance,
                )
            if scales is not None:
                scales.store(processes.all_reduce)
        sites = self.pair.bridge_set.sites
        self.pair.bridge_set.provenance |= {
            "ridge": {site: list(ridges) for site, ridges in zip(sites, found.ridges, strict=True)},
            "fitted_to_massive_tokens": {
                site: list(directions) for site, directions in zip(sites, found.fitted_to_massive, strict=True)
            },
        }
        return StartState(standardizations=found.standardizations)

    def _decoder_freedom(self) -> list[Tensor]:
        batches = self._train_batches(EFFECT_TOKENS)
        with progress_bar("effects of sparse channels, batches", len(batches), self._shown) as bar:
            return decoder_freedoms(self.pair, batches, self.processes.all_reduce, self.config.seed, bar.advance)

    def _random_start(self) -> StartState:
        """Random maps between standardised streams."""
        generator = torch.Generator().manual_seed(self.config.seed)
        for bridge in self.pair.bridge_set:
            bridge.randomize(generator)
        batches = self._train_batches(STANDARDIZATION_TOKENS)
        memory, groups = self.config.moments_bytes, len(list(site_groups(self.pair, self.config.moments_bytes)))
        with progress_bar("scales of the streams, batches", groups * len(batches), self._shown) as bar:
            found = standardize(self.pair, batches, memory, self.processes.all_reduce, bar.advance)
        StandardizedBridges(self.pair.bridge_set, found, standardized=True).fold()
        return StartState(standardizations=found)

    def _set_norm_limits(self, sides: Sequence[Side]) -> None:
        """Find where massive tokens begin, on the first training rows; the main process's medians count."""
        threshold = None if self.config.massive_threshold == "off" else self.config.massive_threshold
        rows = self.data.train_batches(SAMPLED_TOKENS, self.config.batch_size, 0, 1)
        set_norm_limits(self.pair, rows, threshold, sides, self.processes.broadcast)

    def _step_batches(self, step: int) -> list[Batch]:
        return self.data.step_batches(self.config, step, self.processes.rank, self.processes.world_size)

    def _train_batches(self, n_tokens: int) -> list[Batch]:
        """This process's part of the first training rows."""
        processes = self.processes
        return self.data.train_batches(n_tokens, self.config.batch_size, processes.rank, processes.world_size)

    def _ridge_batches(self, n_tokens: int) -> list[Batch]:
        """This process's part of the rows that judge closed forms."""
        processes = self.processes
        return self.data.ridge_batches(n_tokens, self.config.batch_size, processes.rank, processes.world_size)

    def _selection_batches(self, n_tokens: int) -> list[Batch]:
        """This process's part of the rows that the best state is chosen on."""
        processes = self.processes
        return self.data.selection_batches(n_tokens, self.config.batch_size, processes.rank, processes.world_size)

    def _heldout_rows(self) -> tuple[int, int]:
        """How many held-out rows NMSEs are measured on, and how many KLs."""
        rows = self.data.heldout_rows(self.config)
        if self.config.eval_tokens != "auto":
            return rows, rows
        return rows, affordable_kl_rows(self.pair, rows, self.data.heldout.seq_len)

    def _evaluate(self) -> BridgeReport:
        config, processes = self.config, self.processes
        parts = [
            self.data.heldout_batches(rows, config.batch_size, processes.rank, processes.world_size)
            for rows in self._heldout_rows()
        ]
        return measure(
            self.pair,
            parts[0],
            processes.all_reduce,
            config.recorded(),
            kl_batches=parts[1],
            progress=self._shown,
            selection=self.selected[-1].summary() if self.selected else None,
        )

    def _measure(self, identity: RunIdentity) -> None:
        """What a finished set carries: R on both sides, provenance, the held-out report."""
        bridge_set, processes = self.pair.bridge_set, self.processes
        with frozen(self.pair.sparse.model):
            if self.config.train_sparse:
                self._set_norm_limits(SIDES)
            if self.config.train_sparse or not self.config.closed_form:
                batches = self._train_batches(READ_SCALE_TOKENS)
                with progress_bar("scales of the reads, batches", len(batches), self._shown) as bar:
                    measure_read_scales(self.pair, batches, processes.all_reduce, bar.advance)
            bridge_set.report = self._evaluate()
        if processes.is_main:
            warn_of_poor_sites(bridge_set.report)
        bridge_set.record_models(self.pair.dense.model, self.pair.sparse.model)
        bridge_set.provenance |= {"fit": self.config.recorded(), "versions": identity.versions}

    def _save(self, tracker: Tracker) -> None:
        """Write the bridge folder, a trained sparse model and the plot, and end the tracked run."""
        out, bridge_set = self.config.output_dir, self.pair.bridge_set
        if self.processes.is_main:
            plot = None
            if out is not None:
                from bridges.report.plots import quality_plot

                if self.config.train_sparse:
                    self.pair.sparse.model.save_pretrained(out / "sparse", sparse=True)  # pyright: ignore
                plot = quality_plot(bridge_set.report, out / "quality.png") if bridge_set.report else None
                bridge_set.save_pretrained(out)
            tracker.finish(bridge_set.report, out, plot)
        self.processes.barrier()
