"""Compiling kernels for CPUs with numba, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from inspect import unwrap

import torch
from torch import Tensor, nn

_HAS_NUMBA = find_spec("numba") is not None


def has_kernel(x: Tensor) -> bool:
    """Whether compiled kernels can run on this tensor: numba is there, and it is a plain tensor on the CPU."""
    plain = type(x) in (Tensor, nn.Parameter)  # other subclasses may hold no memory of their own
    return _HAS_NUMBA and x.device.type == "cpu" and plain and not torch.compiler.is_compiling()


@cache
def compiled(kernel: Callable[..., None], parallel: bool = False) -> Callable[..., None]:
    """The kernel compiled by numba; `parallel` lets its `prange` loops use as many threads as torch does."""
    import numba  # here, because it is optional and takes half a second to import

    plain = unwrap(kernel)  # the test run wraps every function in a check of its types
    # Sums may be reordered, so that they run as SIMD; NaN and infinity keep their meaning.
    options = {"nogil": True, "parallel": parallel, "fastmath": {"reassoc", "contract"} if parallel else False}
    try:
        made = numba.njit(cache=True, **options)(plain)
    except RuntimeError:  # numba found no folder to keep compiled code in: compile once per process
        made = numba.njit(**options)(plain)
    if not parallel:
        return made

    def threaded(*args: object) -> None:
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # pyright: ignore
        made(*args)

    return threaded
