"""The TOML file of a run: which models and data it joins, and the settings of its fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import nn

from bridges.config import FitConfig
from bridges.data.prepare import prepare
from bridges.data.rows import Rows
from bridges.fitting.processes import ProcessGroup
from bridges.io.files import read_toml, write_text
from bridges.models.loading import as_residual, find_tokenizer, load_model
from bridges.models.sparse.config import SparseConfig
from bridges.models.sparse.model import SparseTransformer

NAME = "run.toml"
"""The run file's name in a run folder."""
TABLES = ("dense", "sparse", "data", "fit")
PRETRAIN_TABLES = ("sparse", "teacher", "data", "pretrain")
MODEL_KEYS = ("path", "dtype", "device_map", "revision", "gguf_file")
DATA_ARGUMENTS = {"path": "data", "eval_path": "eval_data", "tokenizer": "tokenizer"}
"""Keys of [data], and the arguments of `fit` that they are."""


@dataclass(frozen=True)
class RunFile:
    """The tables of a run: [dense], [sparse], [data] and [fit] of a fit; a table that is not given is absent."""

    tables: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, known: Sequence[str] = TABLES) -> RunFile:
        """Read a run file with some of the `known` tables; ValueError names the file and what is wrong with it."""
        tables = read_toml(path)
        if unknown := sorted(tables.keys() - set(known)):
            raise ValueError(f"{path} has the unknown table [{unknown[0]}]; known are {', '.join(sorted(known))}")
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise ValueError(f"{path} has {name}={table!r}; [{name}] must be a table")
        return cls(tables)

    @classmethod
    def of_folder(cls, folder: Path) -> RunFile:
        """The run file of a run folder, without tables where the folder has none."""
        path = folder.expanduser() / NAME
        return cls.read(path) if path.is_file() else cls()

    def with_values(self, values: Sequence[tuple[str, str, Any]]) -> RunFile:
        """The same with some values replaced, each given as (table, key, value)."""
        tables = {name: dict(table) for name, table in self.tables.items()}
        for table, key, value in values:
            tables.setdefault(table, {})[key] = value
        return RunFile(tables)

    def require(self, run_dir: Path, *, data: bool) -> None:
        """ValueError that names every option which a folder without a whole run file needs."""
        missing = [f"--{side}" for side in ("dense", "sparse") if side not in self.tables]
        if data and "fit" not in self.tables:
            missing.append("--data")
        if missing:
            raise ValueError(
                f"RUN_DIR={str(run_dir)!r} does not say which models and data it was fitted on; "
                f"pass {' and '.join(missing)}"
            )

    def settings(self) -> FitConfig:
        """The settings of [fit]."""
        return FitConfig.from_values(self.tables.get("fit", {}))

    def model_path(self, side: str) -> str:
        """The folder, GGUF file or hub id of a model."""
        table = self.tables.get(side, {})
        if "path" not in table:
            raise ValueError(f"[{side}] path is missing; give a folder, a GGUF file or a hub id")
        for key in ("path", "gguf_file"):
            if not isinstance(table.get(key, ""), str):
                raise ValueError(f"[{side}] {key}={table[key]!r} must be text")
        file = Path(table["path"]).expanduser() / table.get("gguf_file", "")
        return str(file) if "gguf_file" in table and file.is_file() else table["path"]

    def model(self, side: str) -> nn.Module | str:
        """Where a model is, or the model, loaded as its table says (dtype, device_map, revision, gguf_file)."""
        path, table = self.model_path(side), self.tables[side]
        in_path = {"path"} if path == table["path"] else {"path", "gguf_file"}
        arguments = {key: value for key, value in table.items() if key not in in_path}
        if unknown := sorted(arguments.keys() - set(MODEL_KEYS)):
            value = arguments[unknown[0]]
            raise ValueError(f"[{side}] {unknown[0]}={value!r} is unknown; known are {', '.join(MODEL_KEYS)}")
        dtype = arguments.get("dtype", "auto")
        if dtype != "auto" and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise ValueError(f"[{side}] dtype={dtype!r} must be float32, bfloat16, float16 or auto")
        if not arguments:
            return path
        with ProcessGroup() as processes:
            return load_model(path, processes.device, **arguments)

    def new_or_saved_sparse(self) -> nn.Module | str:
        """The sparse model: the one at [sparse] path, or without a path a new one of the table's shape."""
        table = self.tables.get("sparse", {})
        return self.model("sparse") if "path" in table else SparseTransformer(SparseConfig(**table))

    def load_models(self) -> tuple[nn.Module, nn.Module]:
        """The dense and the sparse model, on the device that a fit would use."""
        sources = [self.model(side) for side in ("dense", "sparse")]
        with ProcessGroup() as processes:
            dense, sparse = (load_model(source, processes.device) for source in sources)
        return dense, sparse

    def data_arguments(self) -> dict[str, Any]:
        """What [data] says, as the arguments `data`, `eval_data` and `tokenizer` of `fit`."""
        table = self.tables.get("data", {})
        if unknown := sorted(table.keys() - DATA_ARGUMENTS.keys()):
            value, known = table[unknown[0]], ", ".join(DATA_ARGUMENTS)
            raise ValueError(f"[data] {unknown[0]}={value!r} is unknown; known are {known}")
        arguments = {DATA_ARGUMENTS[name]: value for name, value in table.items()}
        if "tokenizer" in arguments:
            source, found = arguments["tokenizer"], find_tokenizer(arguments["tokenizer"])
            if found is None:
                raise ValueError(
                    f"tokenizer={source!r} holds no tokenizer; give a folder with tokenizer.json, or a hub id"
                )
            arguments["tokenizer"] = found
        return arguments

    def tokenizer(self) -> Any:
        """The tokenizer that [data] names, else the one saved with a model, else None."""
        named = self.data_arguments().get("tokenizer")
        if named is not None:
            return named
        found = (find_tokenizer(self.model_path(side)) for side in ("dense", "sparse"))
        return next((tokenizer for tokenizer in found if tokenizer is not None), None)

    def heldout_rows(self, models: tuple[nn.Module, nn.Module]) -> Rows:
        """The held-out rows that the run was measured on."""
        settings, given = self.settings(), self.data_arguments()
        dense, sparse = (as_residual(model) for model in models)
        data = given.get("data"), given.get("eval_data"), given.get("tokenizer")
        paths = self.model_path("dense"), self.model_path("sparse")  # where their tokenizers are
        rows = prepare(dense, sparse, *data, paths, settings).heldout
        return rows.first(rows.rows_holding(settings.heldout_tokens))

    def save(self, folder: Path) -> None:
        """Write the file into a run folder, with absolute local paths, so that it can be read from anywhere.

        A sparse model that was trained is the one in the folder, not the one that the run started from.
        """
        tables = {name: dict(table) for name, table in self.tables.items()}
        for table in tables.values():
            for name in ("path", "eval_path", "tokenizer"):
                if name in table and (path := Path(table[name]).expanduser()).exists():
                    table[name] = str(path.resolve())
        if self.settings().train_sparse:
            tables["sparse"]["path"] = str((folder / "sparse").resolve())
        write_text(folder / NAME, tomli_w.dumps(tables))
