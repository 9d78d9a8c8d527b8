"""Matrix products of float32 in the precision of float32, whatever the process has allowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Inside, products of float32 are not rounded to TF32 or bfloat16: autocast is off, and so are faster products.

    Afterwards the settings are as they were.

    >>> torch.set_float32_matmul_precision("medium")
    >>> with full_precision("cpu"):
    ...     torch.get_float32_matmul_precision()
    'highest'
    >>> torch.get_float32_matmul_precision()
    'medium'
    >>> torch.set_float32_matmul_precision("highest")
    """
    known: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    backends = [backend for backend in known if hasattr(backend, "fp32_precision")]  # from torch 2.9 on
    before = [backend.fp32_precision for backend in backends]
    name = _older_name(before) if before else torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(name)
        for backend, precision in zip(backends, before, strict=True):
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def _older_name(precisions: list[str]) -> str:
    """What get_float32_matmul_precision says of these; it raises where they were set one by one."""
    cuda, cpu = precisions
    if cuda != "tf32":
        return "highest"
    return "medium" if cpu == "bf16" else "high"
