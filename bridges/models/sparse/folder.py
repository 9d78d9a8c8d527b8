"""Finding and reading the folders that a weight-sparse transformer may lie in: ours and both published layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from torch import Tensor

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
"""Keyword arguments of `from_pretrained` that say where a folder comes from."""


class Checkpoint(NamedTuple):
    """What a folder holds."""

    config: SparseConfig
    tensors: dict[str, Tensor]
    source: Path
    """The file or folder the tensors were read from, for messages."""


def locate(path: str | Path, subfolder: str = "", **download: Any) -> Path:
    """A local folder for a path or a hub id; only the files that are needed are fetched, no code among them.

    `download`: keyword arguments of `huggingface_hub.snapshot_download`. OSError when there is no such folder.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or str(path).startswith(("~", ".")) or str(path).count("/") > 1:
            raise FileNotFoundError(f"{path} is not a folder, nor the id of a repository on the hub")
        wanted = [f"{subfolder}/{name}" if subfolder else name for name in _FILES]
        try:
            folder = Path(huggingface_hub.snapshot_download(str(path), allow_patterns=wanted, **download))
        except OSError as error:
            reason = str(error).partition("\n")[0]
            raise OSError(f"{path} is not a folder, and the hub did not give it: {reason}") from error
    return folder / subfolder


def read_folder(folder: Path) -> Checkpoint:
    """The configuration and tensors of a folder in any of the layouts, with the names of our state dict.

    OSError when a file is missing; ValueError, naming the file, when one is empty or damaged or says what is not
    understood.
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
        raise ValueError(f"{path} has model_type={kind!r}; a SparseTransformer is read from {known}")
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
