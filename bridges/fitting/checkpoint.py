"""Checkpoints of a run, as safetensors and JSON. Each is written completely or not at all; the last two are kept."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridges.io.files import read_json, replacing, write_json, write_tensors
from bridges.io.tensors import read_safetensors

N_KEPT = 2


class Checkpoint(NamedTuple):
    """What a run continues from: the number of steps done, plain values, and tensors by file and name."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-N` under a temporary name, rename it, and delete all but the newest two; returns its path."""
    target = folder / f"step-{checkpoint.step:08d}"
    with replacing(target) as temporary:
        temporary.mkdir(parents=True)
        for name, tensors in checkpoint.tensors.items():
            write_tensors(temporary / f"{name}.safetensors", tensors)
        write_json(temporary / "state.json", {"step": checkpoint.step, **checkpoint.state})
    for old in _steps(folder)[:-N_KEPT]:
        shutil.rmtree(old)
    return target


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, or None. Partial checkpoints that a killed run left are deleted."""
    if not folder.is_dir():
        return None
    for partial in folder.glob(".step-*.tmp"):
        shutil.rmtree(partial, ignore_errors=True)  # another process may be deleting it too
    steps = _steps(folder)
    if not steps:
        return None
    state = read_json(steps[-1] / "state.json")
    tensors = {file.stem: read_safetensors(file) for file in sorted(steps[-1].glob("*.safetensors"))}
    return Checkpoint(state.pop("step"), state, tensors)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as tensors named by parameter index and state name, `0.exp_avg`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, values in state.items()
        for name, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load what `optimizer_tensors` gave into an optimiser over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())
