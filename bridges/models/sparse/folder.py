"""Finding and reading folders of weight-sparse transformers: this library's layout and both published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bridges.io.paths import fetch_folder
from bridges.io.tensors import INDEX, SINGLE, read_keys, read_safetensors_folder
from bridges.models.sparse import openai
from bridges.models.sparse.config import SparseConfig
from bridges.models.sparse.nonzeros import read_nonzeros

NONZEROS = "sparse_model.safetensors"
"""The weights of a folder written with `save_pretrained(path, sparse=True)`."""

_FILES = (
    *("config.json", "generation_config.json", openai.RELEASE_CONFIG, openai.RELEASE_WEIGHTS),
    *(NONZEROS, SINGLE, INDEX, "model-*-of-*.safetensors"),
)

DOWNLOAD = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
"""Keyword arguments of `from_pretrained` that `locate` takes."""


class Checkpoint(NamedTuple):
    """What a folder holds."""

    config: SparseConfig
    tensors: dict[str, Tensor]
    source: Path
    """The file or folder the tensors were read from, for messages."""


def locate(path: str | Path, subfolder: str = "", **download: Any) -> Path:
    """The local folder of a model given as a folder or hub id; only the files needed are downloaded, no code.

    `download`: keyword arguments of `huggingface_hub.snapshot_download`. Raises OSError when there is no such folder.
    """
    wanted = [f"{subfolder}/{name}" if subfolder else name for name in _FILES]
    return fetch_folder(path, allow_patterns=wanted, **download) / subfolder


def read_folder(folder: Path) -> Checkpoint:
    """The configuration and tensors of a folder in any layout, with the names of `SparseTransformer`'s state dict.

    Raises OSError when a file is missing; ValueError, naming the file, when one is empty, damaged or has unknown keys.
    """
    if (folder / openai.RELEASE_CONFIG).is_file():
        return Checkpoint(*openai.read_release(folder))
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has neither config.json nor {openai.RELEASE_CONFIG}")
    keys = read_keys(path)
    kind = keys.get("model_type")
    if kind == openai.HUB_MODEL_TYPE:
        return Checkpoint(*openai.read_hub(folder))
    if kind != SparseConfig.model_type:
        known = f"{SparseConfig.model_type} or {openai.HUB_MODEL_TYPE}"
        raise ValueError(f"{path} has model_type={kind!r}; a SparseTransformer needs {known}")
    return Checkpoint(_read_config(path, keys), *_read_own(folder))


def remove_other_weights(folder: Path, written: set[str]) -> None:
    """After a save, remove the weights of an earlier one; nothing is removed if `written` has no weights."""
    if not written & {NONZEROS, SINGLE, INDEX}:
        return
    for path in (folder / NONZEROS, folder / SINGLE, folder / INDEX, *folder.glob("model-*-of-*.safetensors")):
        if path.name not in written:
            path.unlink(missing_ok=True)


def _read_config(path: Path, keys: dict[str, Any]) -> SparseConfig:
    try:
        return SparseConfig(**keys)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_own(folder: Path) -> tuple[dict[str, Tensor], Path]:
    if not (folder / NONZEROS).is_file():
        return read_safetensors_folder(folder), folder
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        raise ValueError(f"{folder} has both {NONZEROS} and {SINGLE}; remove the one that is out of date")
    return read_nonzeros(folder / NONZEROS), folder / NONZEROS
