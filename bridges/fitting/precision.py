"""The precision of a run's products: no launcher may name another one, and torch's setting is put back afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch

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


@contextmanager
def float32_products(precision: str | None) -> Iterator[str | None]:
    """Inside, torch multiplies float32 matrices in this precision; None leaves torch's own setting alone.

    Yields the precision that is in use; None where torch's newer settings, one for each library, give it no name.
    """
    before = _float32_precision()
    if precision is None:
        yield before
        return
    # Torch 2.9 and later have a setting for each library, which `set_float32_matmul_precision` overwrites.
    modules = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    libraries = [(module, module.fp32_precision) for module in modules if hasattr(module, "fp32_precision")]
    torch.set_float32_matmul_precision(precision)
    try:
        yield precision
    finally:
        # Without a name it is torch's default: torch refuses to tell it once a library has a setting of its own.
        torch.set_float32_matmul_precision(before or "highest")
        for module, value in libraries:
            module.fp32_precision = "none"  # as the setting of the library or of all
            if module.fp32_precision != value:
                module.fp32_precision = value


def _float32_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the only way to learn that settings of single libraries contradict it
        return None
