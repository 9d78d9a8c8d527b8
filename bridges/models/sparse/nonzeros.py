"""A safetensors file that holds the nonzero entries of its tensors only.

A tensor T is stored as `T.values`, its nonzero entries in row-major order, and `T.gaps`, the distance of each from the
one before (of the first: from the start), in the smallest integer type that holds them. A tensor for which that would
be larger is stored as it is. The file's one metadata key, `nonzeros`, gives the shapes. Negative zero becomes zero;
everything else is read back bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bridges.io.files import write_tensors
from bridges.io.tensors import read_safetensors

METADATA_KEY = "nonzeros"
_GAP_TYPES = (torch.uint8, torch.uint16, torch.uint32, torch.int64)


def write_nonzeros(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` in this format, whole or not at all; equal tensors give equal bytes."""
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        gaps, values = _encode(tensor)
        if gaps.nbytes + values.nbytes < tensor.nbytes:
            stored |= {f"{name}.gaps": gaps, f"{name}.values": values}
            shapes[name] = list(tensor.shape)
        else:
            stored[name] = tensor
    write_tensors(path, stored, {METADATA_KEY: json.dumps(shapes, sort_keys=True, separators=(",", ":"))})


def read_nonzeros(path: str | Path) -> dict[str, Tensor]:
    """The tensors that `write_nonzeros` wrote; OSError when the file does not exist, ValueError when it is damaged."""
    path = Path(path)
    stored = read_safetensors(path)
    return {**{name: _decode(stored, name, shape, path) for name, shape in _read_shapes(path).items()}, **stored}


def _encode(tensor: Tensor) -> tuple[Tensor, Tensor]:
    flat = tensor.flatten()
    indices = flat.nonzero().squeeze(-1)
    gaps = indices.diff(prepend=indices.new_zeros(1))
    largest = int(gaps.max()) if len(gaps) else 0
    smallest = next(kind for kind in _GAP_TYPES if largest <= torch.iinfo(kind).max)
    return gaps.to(smallest), flat[indices]


def _decode(stored: dict[str, Tensor], name: str, shape: list[int], path: Path) -> Tensor:
    """One tensor from its values and gaps, which are removed from `stored`."""
    gaps, values = stored.pop(f"{name}.gaps", None), stored.pop(f"{name}.values", None)
    if gaps is None or values is None:
        raise ValueError(f"{path}: the tensor {name} is missing; fetch the file again")
    indices, size = gaps.long().cumsum(0), math.prod(shape)
    if gaps.shape != values.shape or (len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size):
        raise ValueError(f"{path}: the nonzeros of {name} do not fit its shape {shape}; fetch the file again")
    flat = values.new_zeros(size)
    flat[indices] = values
    return flat.view(shape)


def _read_shapes(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})[METADATA_KEY])
    except (SafetensorError, KeyError, ValueError):
        raise ValueError(
            f"{path} is not a file of nonzeros: its metadata has no {METADATA_KEY} that can be read"
        ) from None
