"""A step of `fit` reads its figures once; nothing else in it makes the host wait for a GPU.

On a CPU nothing waits, but the operations that would are the same.
"""

import pytest
import torch
from pairs import MASK, gpt2, join, sparse_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from bridges.config import FitConfig
from bridges.fitting import trainer as trainer_module
from bridges.fitting.processes import ProcessGroup
from bridges.fitting.trainer import Trainer
from bridges.models.huggingface.adapter import HuggingFaceResidual
from bridges.models.sparse import blocks
from bridges.ops import kl
from bridges.sparsity import support

aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal)
INDEXES = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)


class Waits(TorchDispatchMode):
    """Collects the operations whose result the host, or the size of a tensor, depends on."""

    def __init__(self):
        super().__init__()
        self.found, self.paused = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.paused and func.overloadpacket in READS + INDEXES:
            indices = args[1] if func.overloadpacket in INDEXES else ()
            by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
            if by_mask or func.overloadpacket in READS:
                self.found.append(str(func))
        return func(*args, **(kwargs or {}))

    def pausing(self, function):
        """The function, with what it does left out."""

        def paused(*args, **options):
            before, self.paused = self.paused, True
            try:
                return function(*args, **options)
            finally:
                self.paused = before

        return paused


def test_what_would_wait_is_found():
    x, mask = torch.randn(3, 2, requires_grad=True), torch.tensor([True, False, True])
    with Waits() as waits:
        x[mask].sum().backward()
        x.detach()[mask] = 0.0
        assert mask.sum() > 1
        mask.nonzero(), x.masked_select(mask[:, None])
    names = ["index.Tensor", "index_put.default", "index_put_.default", "_local_scalar_dense.default"]
    assert waits.found == [f"aten.{name}" for name in (*names, "nonzero.default", "masked_select.default")]
    with Waits() as waits:
        x[torch.tensor([0, 2])].sum().backward()
        torch.where(mask[:, None], x, 0).sum().backward()
    assert waits.found == []


def small():
    """A model whose passes wait for nothing; one of transformers looks at its mask."""
    return sparse_model(width=8, seed=9)


def train_step_on_a_gpu(found, batches, monkeypatch):
    """What would wait in a step, as a GPU would run it, and how many times the figures are read."""
    waits, reads = Waits(), []
    # What reads values on a CPU alone, where that costs nothing.
    monkeypatch.setattr(kl, "_read_at_no_cost", lambda tensor: False)
    monkeypatch.setattr(blocks, "has_fused_attention", lambda *tensors: False)
    monkeypatch.setattr(support, "has_parallel_kernel", lambda tensor: False)
    # AdamW counts its steps on the CPU.
    for optimizer in (found.bridge_optimizer, *([found.sparse.optimizer] if found.sparse else [])):
        monkeypatch.setattr(optimizer, "step", waits.pausing(optimizer.step))
    dense = found.pair.dense
    if isinstance(dense, HuggingFaceResidual):
        for name in ("context", "head"):
            monkeypatch.setattr(dense, name, waits.pausing(getattr(dense, name)))
    path = found.sampled_path(found.step + 1)
    monkeypatch.setattr(found, "sampled_path", lambda step: path)
    read = waits.pausing(trainer_module.step_losses)
    monkeypatch.setattr(trainer_module, "step_losses", lambda *args: reads.append(args) or read(*args))
    with waits:
        losses = found.train_step(batches)
    return losses, waits.found, len(reads)


SETTINGS = {
    "frozen": {},
    "path": {"path_weight": 0.5},
    "joint": {"train_sparse": True},
    "projected": {"train_sparse": True, "target_density": 0.5},
}


@pytest.mark.parametrize("rows", ["padded", "micro-batches", "whole"])
@pytest.mark.parametrize("dense", [small, gpt2])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_reads_its_figures_once_and_waits_for_nothing_else(settings, dense, rows, monkeypatch):
    ids = tokens()
    parts = {"padded": [slice(4)], "micro-batches": [slice(2), slice(2, 4)], "whole": [slice(4)]}[rows]
    batches = [(ids[part], None if rows == "whole" else MASK[part]) for part in parts]
    config = FitConfig(steps=4, sites_per_step=2, **settings)
    found = Trainer(join(dense(), sparse_model()), config, ProcessGroup())
    found.train_step(batches)
    losses, waits, reads = train_step_on_a_gpu(found, batches, monkeypatch)
    assert waits == [] and reads == 1
    assert losses.loss > 0 and losses.tokens == (28 if rows == "whole" else 17)
