"""What two runs must share so that one may resume the other: settings, data and models."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from bridges.config import FitConfig
from bridges.io.fingerprint import fingerprint, same_model
from bridges.models.sparse.config import FIELDS
from bridges.objective.pair import ModelPair

RESOURCE_SETTINGS = ("checkpoint_every", "moments_gib")
"""Settings that no result depends on; a run may be resumed with other values of them."""
BATCH_SETTINGS = ("processes", "batch_size", "gradient_accumulation_steps")
"""How a step's rows are split; a run may be resumed with other values whose product is the same."""


@dataclass(frozen=True)
class RunIdentity:
    """The settings, data and models of a run."""

    settings: dict[str, Any]
    data: str
    """The fingerprint of the training and the held-out rows."""
    dense: str
    """Fingerprint of the dense model."""
    sparse: str | None
    """Fingerprint of a frozen sparse model; None where it trains: its weights change, and the checkpoint holds them."""
    versions: dict[str, str]
    dropout: float = 0.0
    """Of what trains; its masks are drawn by process and micro-batch."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """The configuration of a sparse model that trains: the checkpoint holds its weights alone."""

    @classmethod
    def of(
        cls, pair: ModelPair, config: FitConfig, data: str, versions: dict[str, str], world_size: int = 1
    ) -> RunIdentity:
        """The identity of a run that is about to start on so many processes."""
        sparse = None if config.train_sparse else fingerprint(pair.sparse.model)
        settings = {name: value for name, value in config.recorded().items() if name not in RESOURCE_SETTINGS}
        settings["processes"] = world_size
        dropout = getattr(pair.sparse.model.config, "dropout", 0.0) if config.train_sparse else 0.0
        shape = architecture(pair.sparse.model) if config.train_sparse else {}
        return cls(settings, data, fingerprint(pair.dense.model), sparse, versions, dropout, shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint stores them."""
        return asdict(self)


def architecture(model: nn.Module) -> dict[str, Any]:
    """The fields of a `SparseTransformer`'s configuration that its outputs depend on."""
    return {name: getattr(model.config, name) for name in FIELDS if name != "tokenizer_name"}


def refuse_other_run(stored: dict[str, Any], here: RunIdentity) -> None:
    """ValueError, naming both values, if the `stored` identity has other settings, data or models than `here`."""
    _refuse_loss_that_left(stored["settings"])
    _refuse_other_batch(stored["settings"], here)
    for name, value in here.settings.items():
        if name in BATCH_SETTINGS:
            continue
        # A setting that was added after the run had started had its default value.
        known = FitConfig.model_fields.get(name)
        started = stored["settings"].get(name, None if known is None else known.default)
        if name == "float32_precision" and None in (started, value):
            continue  # an earlier version did not record it, or torch's newer settings have no name for it
        if started != value:
            raise ValueError(
                f"resume=True with {name}={value!r}, but the run was started with {name}={started!r}; "
                "use that value, or another output_dir"
            )
    for name, value in here.architecture.items():
        started = stored.get("architecture", {}).get(name, value)  # a run of an earlier version did not record it
        if started != value:
            raise ValueError(
                f"resume=True with a sparse model of {name}={value!r}, but the run was started with {started!r}; pass "
                "a model of the same configuration, or another output_dir"
            )
    for side, other in (("dense", "sparse"), ("sparse", "dense")):
        known, given = stored[side], getattr(here, side)
        if known and given and not same_model(known, given):
            if stored[other] and same_model(stored[other], given):
                raise ValueError(
                    f"resume=True with the run's {other} model as {side}: dense and sparse are swapped, or one is "
                    "given twice"
                )
            raise ValueError(
                f"resume=True with another {side} model ({given.split()[0]}, the run was started with "
                f"{known.split()[0]}); pass the same model, or another output_dir"
            )
    if stored["data"] != here.data:
        raise ValueError(
            f"resume=True with other data ({here.data}, the run was started with {stored['data']}); "
            "pass the same data, or another output_dir"
        )


def _refuse_other_batch(stored: dict[str, Any], here: RunIdentity) -> None:
    """ValueError unless a step takes the rows that it took when the run was started, on any number of processes."""
    started, now = ([settings.get(name, 1) for name in BATCH_SETTINGS] for settings in (stored, here.settings))
    if started == now:
        return
    n_rows, n_started = math.prod(now), math.prod(started)
    if n_rows != n_started:
        raise ValueError(
            f"resume=True with {_split(now)}, {n_rows} rows a step, but the run was started with {n_started} "
            f"({_split(started)}); {_split_of(n_started, here.settings)}, or use another output_dir"
        )
    if here.dropout:
        raise ValueError(
            f"resume=True with {_split(now)}, but the run was started with {_split(started)}, and dropout="
            f"{here.dropout} draws its masks by process and micro-batch; use those values, or another output_dir"
        )


def _split(values: list[int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in zip(BATCH_SETTINGS, values, strict=True))


def _split_of(n_rows: int, settings: dict[str, Any]) -> str:
    """What to pass so that these processes take so many rows together."""
    processes, micro = settings["processes"], settings["gradient_accumulation_steps"]
    if n_rows % (processes * micro) == 0:
        return f"pass batch_size={n_rows // (processes * micro)}"
    if n_rows % processes == 0:
        return f"pass batch_size={n_rows // processes}, gradient_accumulation_steps=1"
    return f"start a number of processes that divides {n_rows}"


def _refuse_loss_that_left(settings: dict[str, Any]) -> None:
    """ValueError if a run of an earlier version had the interchange loss: its objective would be another."""
    if weight := settings.get("interchange_weight"):
        raise ValueError(
            f"resume=True, but the run was started with interchange_weight={weight!r}, and the interchange loss left "
            "in this version; use another output_dir, or finish the run with the version that started it"
        )


def refuse_used_folder(output_dir: Path | None) -> None:
    """ValueError if a new run would overwrite another one in its folder."""
    if output_dir is None:
        return
    for name in ("checkpoints", "config.json", "metrics.jsonl"):
        if (output_dir / name).exists():
            raise ValueError(
                f"output_dir={str(output_dir)!r} already holds a run ({name}); pass resume=True to continue it, "
                "or another folder"
            )
