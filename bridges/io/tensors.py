"""Reading tensors from files: no pickle is run, and every error names the file or the tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bridges.io.files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_keys(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError, naming the file, when it is damaged or something else."""
    keys = read_json(path)
    if not isinstance(keys, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(keys).__name__}")
    return keys


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file; OSError when it does not exist, ValueError when it is empty or damaged."""
    _require_content(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch it again") from None


def read_safetensors_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists."""
    if not (folder / INDEX).is_file():
        return read_safetensors(folder / SINGLE)
    weight_map = read_keys(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{folder / INDEX} has no weight_map; fetch it again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        tensors |= read_safetensors(folder / Path(shard).name)  # .name: an index must not name files elsewhere
    return tensors


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a plain state dict in a `.pt` file, read with `weights_only=True`: no code in it is run.

    OSError when it does not exist, ValueError when it is empty, damaged or holds anything but named tensors.
    """
    _require_content(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader raise almost any type
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged or not a plain state dict ({reason}); fetch it again") from None
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} must hold a plain state dict (tensors by name), not a {type(content).__name__}")
    return dict(content)


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: Path) -> None:
    """Raise ValueError naming the first tensor that is missing, unexpected, of another shape, or not of floats."""
    for name in expected:
        if name not in tensors:
            raise ValueError(f"{where}: the tensor {name} is missing; the configuration asks for it")
    for name, tensor in tensors.items():
        if name not in expected:
            raise ValueError(f"{where}: the tensor {name} is not expected; the configuration does not ask for it")
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)}, not {list(expected[name].shape)} as the configuration says"
            raise ValueError(f"{where}: the tensor {name} has shape {shapes}")
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: the tensor {name} holds {tensor.dtype}; it must hold floating-point numbers")


def _require_content(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; the folder is not a whole checkpoint")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); fetch it again")
