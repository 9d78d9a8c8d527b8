"""The mixed precision of a run: a launcher may not name another one than its settings."""

from __future__ import annotations

import os
from typing import get_args

from bridges.config import FitConfig
from bridges.sparsity.settings import PretrainConfig

LAUNCHER_VARIABLE = "ACCELERATE_MIXED_PRECISION"
"""What `accelerate launch` sets in every process: its `--mixed_precision`, or that of its configuration, or "no"."""


def refuse_other_mixed_precision(config: FitConfig | PretrainConfig) -> None:
    """ValueError, naming both values, if `accelerate launch` was given another mixed precision than the settings have.

    The settings count, since they are recorded and compared on resume. "no" is accepted: a launcher sets it unasked.
    """
    launched = os.environ.get(LAUNCHER_VARIABLE, "").lower() or "no"
    if launched in ("no", config.mixed_precision):
        return
    known = launched in get_args(type(config).model_fields["mixed_precision"].annotation)
    setting = f'set mixed_precision="{launched}" in the settings of {config.verb}, or ' if known else ""
    raise ValueError(
        f"{LAUNCHER_VARIABLE}={launched!r}, by the launcher or its configuration, differs from mixed_precision="
        f"{config.mixed_precision!r} of {config.verb}, which counts; {setting}start the launcher with "
        "--mixed_precision no"
    )
