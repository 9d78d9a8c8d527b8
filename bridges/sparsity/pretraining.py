"""The steps of weight-sparse training alone: next-token loss, the KL to a teacher, a support that moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bridges.models.modes import eval_mode
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.models.tokens import Batch
from bridges.objective.normalizers import predicting_tokens
from bridges.objective.sums import Reduce, no_reduce
from bridges.ops.kl import kl_divergence
from bridges.sparsity import projection
from bridges.sparsity.graphed import GraphedStep
from bridges.sparsity.moving import MoveSchedule, moved_masks
from bridges.sparsity.settings import PretrainConfig
from bridges.sparsity.support import Support, training_kernels

WARM_UP = 3
"""Steps before one is recorded as a CUDA graph: they compile kernels and make the optimiser's moments."""


class Losses(NamedTuple):
    """The two losses of some batches, each a mean over its tokens in nats, on the model's device."""

    ce: Float[Tensor, ""]
    """Next-token cross-entropy."""
    kl: Float[Tensor, ""]
    """KL(teacher || model); 0 without a teacher."""


@dataclass(frozen=True)
class Processes:
    """What a step does together with other processes; by default there are none."""

    rank: int = 0
    reduce: Reduce = no_reduce
    sum_gradients: Callable[[Iterable[Tensor]], None] = lambda parameters: None
    autocast: Callable[[], AbstractContextManager] = nullcontext


class _TokenCounts(NamedTuple):
    """How many tokens the two losses are means over, all processes together."""

    predicting: Float[Tensor, ""]
    real: Float[Tensor, ""]


class Densities(NamedTuple):
    """The fractions of weights kept at the start and at the end."""

    start: float
    target: float

    @classmethod
    def of(cls, model: SparseTransformer, config: PretrainConfig) -> Densities:
        """Those of the settings, where these are None those of the model."""
        start = projection.density(model) if config.start_density is None else config.start_density
        target = start if config.target_density is None else config.target_density
        return cls(max(start, target), target)


class Pretrainer:
    """Trains a sparse model in place, one `step` after the other.

    The model is to hold its first weights already, pruned to the first density (`prune_to_start`). `step` counts the
    steps done. With `support="moving"`, `support.masks` are the entries that may differ from zero.
    """

    def __init__(
        self,
        model: SparseTransformer,
        teacher: ResidualModel | None,
        config: PretrainConfig,
        densities: Densities,
        processes: Processes | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ):
        self.model, self.teacher, self.config, self.densities = model, teacher, config, densities
        self.processes = Processes() if processes is None else processes
        self.step = 0
        self._schedule = _move_schedule(config, densities)
        self.support: Support | None = None
        """None with `support="projected"`, where every weight trains."""
        if config.support != "projected":
            found = projection.supports(model) if masks is None else masks
            self.support = Support(model, found, use_kernels=config.mixed_precision == "no")
        graphed = config.cuda_graph and model.device.type == "cuda"
        # A graph reads the learning rate from the device, in float32.
        lr = torch.tensor(config.lr, device=model.device) if graphed else config.lr
        groups = self._parameter_groups()
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=config.eps, capturable=graphed)
        self._graphed = graphed
        self._graph: tuple[object, GraphedStep] | None = None
        """A recorded step, and what it holds for: `_recorded_for`."""
        self._steps_here = 0
        """Steps that this object has run kernel by kernel."""

    def kept(self, step: int) -> float:
        """The fraction of weights kept after a step, counted from 1."""
        fraction = projection.geometric_fraction if self.config.schedule == "geometric" else projection.kept_fraction
        return fraction(step, self.config.steps, self.densities.target, self.config.anneal, self.densities.start)

    def moves(self, step: int) -> bool:
        """Whether the support moves after a step."""
        return self._schedule is not None and self._schedule.moves_after(step)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        c = self.config
        return projection.learning_rate(step, c.steps, c.lr, c.warmup, self.kept(step), self.densities.target)

    def train_step(self, batches: Sequence[Batch]) -> Losses:
        """One step on this process's micro-batches; its losses over all processes."""
        step = self.step + 1
        # Dropout is the only user of randomness; seeded by the step, a resumed run draws what the first one did.
        torch.manual_seed((self.config.seed * 1_000_003 + step) * 1009 + self.processes.rank)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.learning_rate(step))
            else:
                group["lr"] = self.learning_rate(step)
        if self.moves(step):
            losses, gradients = self._update(step, batches, whole=True)
            self._move(step, gradients)
        elif self._graphed and self._steps_here >= WARM_UP and all(mask is None for _, mask in batches):
            losses = self._update_by_graph(step, batches)
        else:
            losses, _ = self._update(step, batches)
        self.step = step
        return losses

    def _update(
        self, step: int, batches: Sequence[Batch], whole: bool = False, counts: _TokenCounts | None = None
    ) -> tuple[Losses, dict[str, Tensor]]:
        """Gradients, the optimiser's step and the weights that stay zero; the gradients of `whole` tensors if asked."""
        self._steps_here += 1
        losses, gradients = self.gradients(batches, whole, counts)
        projection.clip_to_rms(parameter for group in self.optimizer.param_groups for parameter in group["params"])
        self.optimizer.step()
        if self.support is None:
            projection.project(self.model, self.kept(step), self.config.min_per_channel)
        else:
            self.support.scatter()
        return losses, gradients

    def _update_by_graph(self, step: int, batches: Sequence[Batch]) -> Losses:
        """`_update` as a graph, which is recorded anew where tensors or constants have changed."""
        rows = [ids for ids, _ in batches]
        sizes = tuple(p.numel() for p in self.support.parameters()) if self.support is not None else self.kept(step)
        recorded_for = (sizes, tuple(ids.shape for ids in rows))
        if self._graph is None or self._graph[0] != recorded_for:
            self._graph = None  # its memory goes to the next one
            counts = self._token_counts(batches)

            def update(static: Sequence[Tensor]) -> Losses:
                return self._update(step, [(ids, None) for ids in static], counts=counts)[0]

            self._graph = (recorded_for, GraphedStep(update, rows, self.model.device))
        return Losses(*self._graph[1](rows))

    def losses(self, batches: Sequence[Batch], train: bool = False, counts: _TokenCounts | None = None) -> Losses:
        """The losses of some batches over all processes; with `train` their weighted sum is backpropagated."""
        n_predicting, n_real = self._token_counts(batches) if counts is None else counts
        device = self.model.device
        # In float64, whatever the model: a process without batches adds its zeros to the others' sums.
        ce, kl = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        for input_ids, attention_mask in batches:
            ids = input_ids.to(device, non_blocking=True)
            mask = None if attention_mask is None else attention_mask.to(device, non_blocking=True)
            with self.processes.autocast():
                target = self._target(ids, mask)
                logits = self.model(ids, attention_mask=mask, use_cache=False).logits
            own_ce = _ce_sum(logits, ids, mask) / n_predicting
            own_kl = own_ce.new_zeros(()) if target is None else _kl_sum(target, logits, mask) / n_real
            if train:
                (self.config.ce_weight * own_ce + self.config.kl_weight * own_kl).backward()
            ce, kl = ce + own_ce.detach(), kl + own_kl.detach()
        total = self.processes.reduce(torch.stack([ce, kl]))
        return Losses(total[0], total[1])

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The losses of this process's part of the held-out rows, over all processes, under their metric names."""
        kernels = nullcontext() if self.support is None else self.support.sparse_kernels()
        with eval_mode(self.model), kernels:
            losses = self.losses(batches)
        row = {"eval/ce": losses.ce.item()}
        return row if self.teacher is None else {**row, "eval/kl": losses.kl.item()}

    def gradients(
        self, batches: Sequence[Batch], whole: bool = False, counts: _TokenCounts | None = None
    ) -> tuple[Losses, dict[str, Tensor]]:
        """Bring gradients, summed over processes, to what the optimiser trains; those of `whole` tensors if asked."""
        support, processes = self.support, self.processes
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)
        with training_kernels(self.model, support, self.config.mixed_precision, whole):
            losses = self.losses(batches, True, counts)
        if support is None:
            processes.sum_gradients(self.model.parameters())
            return losses, {}
        return losses, support.sum_gradients(processes.sum_gradients, whole)

    def _move(self, step: int, gradients: Mapping[str, Tensor]) -> None:
        assert self.support is not None and self._schedule is not None
        c, share = self.config, self._schedule.share_at(step)
        importance = self.support.saliencies(self.optimizer) if c.move_by == "saliency" else None
        masks = moved_masks(
            self.model, self.support.masks, gradients, self.kept(step), share, c.min_per_channel, importance
        )
        self.support.move(masks, self.optimizer)

    def _parameter_groups(self) -> list[dict]:
        """Matrices decay; biases, norms, sinks and the like do not."""
        if self.support is None:
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            decaying = [p for p in parameters if p.ndim == 2]
        else:
            parameters, decaying = self.support.parameters(), self.support.matrices()
        rest = [p for p in parameters if not any(p is one for one in decaying)]
        return [
            {"params": decaying, "weight_decay": self.config.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]

    @torch.no_grad()
    def _target(self, ids: Int[Tensor, "b s"], mask: Int[Tensor, "b s"] | None) -> Float[Tensor, "b s vocab"] | None:
        """The teacher's logits, on the model's device."""
        if self.teacher is None:
            return None
        device = self.teacher.device
        logits = self.teacher.trace(ids.to(device), mask if mask is None else mask.to(device)).logits
        return logits.to(ids.device)

    def _token_counts(self, batches: Sequence[Batch]) -> _TokenCounts:
        """Counted where the rows are, so no device is waited for."""
        predicting = sum(int(predicting_tokens(ids, mask).sum()) for ids, mask in batches)
        real = sum(ids.numel() if mask is None else int(mask.sum()) for ids, mask in batches)
        counts = self.processes.reduce(torch.tensor([float(predicting), float(real)])).clamp(min=1)
        device = self.model.device
        return _TokenCounts(*(count.to(device, non_blocking=True) for count in counts))


def prune_to_start(model: SparseTransformer, config: PretrainConfig) -> Densities:
    """Prune a model to `start_density`, where that is set; the densities of the run."""
    densities = Densities.of(model, config)
    if config.start_density is not None and config.support != "fixed":
        projection.project(model, config.start_density, config.min_per_channel)
    return densities


def _move_schedule(config: PretrainConfig, densities: Densities) -> MoveSchedule | None:
    """When the support moves; None where it does not."""
    c = config
    if c.support != "moving":
        return None
    falls = densities.target < densities.start
    return MoveSchedule(c.steps, c.move_every, c.move_share, c.move_until, c.anneal, falls)


def _ce_sum(
    logits: Float[Tensor, "b s vocab"], ids: Int[Tensor, "b s"], mask: Int[Tensor, "b s"] | None
) -> Float[Tensor, ""]:
    """The summed next-token cross-entropy over tokens that are real and followed by a real one."""
    labels = ids[:, 1:]
    if mask is not None:
        labels = labels.masked_fill(~predicting_tokens(ids, mask), -100)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).to(wide), labels.flatten(), reduction="sum", ignore_index=-100)


def _kl_sum(
    target: Float[Tensor, "b s target"], logits: Float[Tensor, "b s vocab"], mask: Int[Tensor, "b s"] | None
) -> Float[Tensor, ""]:
    """The summed KL over real tokens and the vocabulary that both models have."""
    width = min(target.shape[-1], logits.shape[-1])
    target, logits = target[..., :width].flatten(0, 1), logits[..., :width].flatten(0, 1)
    return kl_divergence(target, logits, None if mask is None else mask.flatten().bool())
