"""What makes two runs the same run, so that one may continue the other."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bridges.config import FitConfig
from bridges.io.fingerprint import fingerprint, same_model
from bridges.objective.hybrid import ModelPair

RESOURCES = ("checkpoint_every", "moments_gib")
"""Settings that say what a run may take, not what it computes: another value carries it on as well."""


@dataclass(frozen=True)
class RunIdentity:
    """Settings, data and models of a run."""

    settings: dict[str, Any]
    data: str
    """The fingerprint of the training and the held-out rows."""
    dense: str
    sparse: str | None
    """None where the sparse model trains: its weights change, and the checkpoint holds them."""
    versions: dict[str, str]

    @classmethod
    def of(
        cls, pair: ModelPair, config: FitConfig, data: str, versions: dict[str, str], processes: int = 1
    ) -> RunIdentity:
        """The identity of a run about to start."""
        sparse = None if config.train_sparse else fingerprint(pair.sparse.model)
        settings = {name: value for name, value in config.recorded().items() if name not in RESOURCES}
        return cls({**settings, "processes": processes}, data, fingerprint(pair.dense.model), sparse, versions)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in a checkpoint."""
        return asdict(self)


def refuse_other_run(stored: dict[str, Any], here: RunIdentity) -> None:
    """ValueError, naming both values, if a checkpoint is of a run with other settings, data or models."""
    for name, value in here.settings.items():
        # A setting that came after the run was started had its default.
        field = FitConfig.model_fields.get(name)
        started = stored["settings"].get(name, None if field is None else field.default)
        if started != value:
            raise ValueError(
                f"resume=True with {name}={value!r}, but the run was started with {name}={started!r}; "
                "use that value, or another output_dir"
            )
    if stored["data"] != here.data:
        raise ValueError(
            f"resume=True with other data ({here.data}, the run was started with {stored['data']}); "
            "pass the same data, or another output_dir"
        )
    for side in ("dense", "sparse"):
        known, given = stored[side], getattr(here, side)
        if known and given and not same_model(known, given):
            raise ValueError(f"resume=True with another {side} model than the run was started with")


def refuse_used_folder(output_dir: Path | None) -> None:
    """ValueError if a new run would write over what lies in its folder."""
    if output_dir is None:
        return
    for name in ("checkpoints", "config.json", "metrics.jsonl"):
        if (output_dir / name).exists():
            raise ValueError(
                f"output_dir={str(output_dir)!r} already holds a run ({name}); pass resume=True to continue it, "
                "or another folder"
            )
