"""The two files that make a bridge folder: `config.json`, and the tensors in `bridges.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridges.io.tensors import check_tensors, read_keys, read_safetensors

CONFIG_FILE = "config.json"
TENSORS_FILE = "bridges.safetensors"
FORMAT_VERSION = 3
_SINCE_FORMAT_3 = ("median_dense", "median_sparse", "norm_limit_dense", "norm_limit_sparse")
_KEYS = ("format_version", "pairs", "d_dense", "d_sparse", "k", "dtype")
"""The keys of `config.json` that every bridge folder has."""


class FolderConfig(NamedTuple):
    """What `config.json` says of a set of bridges."""

    site_pairs: list[tuple[str, str]]
    """(dense site, sparse site) of each bridge."""
    d_dense: int
    d_sparse: int
    k: int
    dtype: torch.dtype
    """Of the weights."""
    provenance: Mapping[str, Any]
    """All other keys."""
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, folder: Path) -> FolderConfig:
        """Read the file of a folder; ValueError says what is wrong with it."""
        path = folder / CONFIG_FILE
        config = read_keys(path)
        version = config.get("format_version")
        if version not in (2, FORMAT_VERSION):
            found = f"format_version={version!r}"
            raise ValueError(f"{path}: {found}, but this version of bridges reads 2 and {FORMAT_VERSION}")
        if missing := [key for key in _KEYS if key not in config]:
            raise ValueError(f"{path} lacks {missing[0]!r}, which every bridge folder has")
        dtype = getattr(torch, str(config["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{path}: dtype={config['dtype']!r} is not a dtype of torch")
        pairs, *sizes = (config[name] for name in _KEYS[1:5])
        in_pairs = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
        if not in_pairs or not pairs or not all(isinstance(size, int) for size in sizes):
            wanted = "pairs must be a list of [dense site, sparse site]; d_dense, d_sparse and k must be integers"
            raise ValueError(f"{path}: {wanted}; fetch it again")
        provenance = {key: value for key, value in config.items() if key not in _KEYS}
        d_dense, d_sparse, k = sizes
        site_pairs = [(dense, sparse) for dense, sparse in pairs]
        return cls(site_pairs, d_dense, d_sparse, k, dtype, provenance, version)

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return {
            "format_version": self.format_version,
            "pairs": [list(pair) for pair in self.site_pairs],
            "d_dense": self.d_dense,
            "d_sparse": self.d_sparse,
            "k": self.k,
            "dtype": str(self.dtype).removeprefix("torch."),
            **self.provenance,
        }


def read_tensors(folder: Path, expected: Mapping[str, Tensor], format_version: int) -> dict[str, Tensor]:
    """The tensors of a folder, by name; ValueError unless they have the names and shapes of the `expected` ones.

    A tensor that an earlier format did not have is the expected one.
    """
    path = folder / TENSORS_FILE
    stored = read_safetensors(path)
    if format_version == 2:  # left out no massive token
        stored = {name: t for name, t in expected.items() if name.rpartition(".")[2] in _SINCE_FORMAT_3} | stored
    check_tensors(stored, expected, path)
    return stored
