"""Where compiled kernels can run, and how numba compiles them; numba is optional and imported when a kernel is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import wraps
from importlib.util import find_spec
from inspect import unwrap
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

_HAS_NUMBA = find_spec("numba") is not None
# Torch 2.8 brings Triton 3.4, which has all that the kernels use.
_HAS_TRITON = find_spec("triton") is not None and TorchVersion(torch.__version__) >= "2.8"
MAX_TRITON_ENTRIES = 2**30
"""Triton kernels count the entries of a row in 32 bits."""
_forked_after_openmp = False
"""Whether an ancestor of this process had started OpenMP threads in numba before it forked."""
_workqueue_lock = Lock()
"""Numba's workqueue layer ends the process when two threads run parallel kernels at once; omp and tbb allow it."""


def has_kernel(x: Tensor) -> bool:
    """Whether compiled kernels can run on this tensor: numba is installed and it is a plain tensor on the CPU."""
    plain = type(x) in (Tensor, nn.Parameter)  # other subclasses may hold no memory of their own
    return _HAS_NUMBA and x.device.type == "cpu" and plain and not torch.compiler.is_compiling()


def has_triton_kernel(x: Tensor) -> bool:
    """Whether Triton kernels can run on the rows of this tensor: a plain tensor on a GPU."""
    fits = x.ndim > 0 and x.shape[-1] <= MAX_TRITON_ENTRIES
    plain = type(x) in (Tensor, nn.Parameter)
    return _HAS_TRITON and x.is_cuda and fits and plain and not torch.compiler.is_compiling()


def has_parallel_kernel(x: Tensor) -> bool:
    """Whether kernels of several threads can run on this tensor.

    They cannot in a process that was forked after they had run: OpenMP's threads do not survive a fork. On one thread
    the dense product takes their place there. Raises RuntimeError if torch is to use more, since it would wait forever.
    """
    if has_kernel(x) and _forked_after_openmp and (n_threads := torch.get_num_threads()) > 1:
        raise RuntimeError(
            f"this process was forked after OpenMP's threads had started, which do not survive a fork; torch would use "
            f"{n_threads} and wait forever. Start processes with multiprocessing's 'spawn' method, or call "
            "torch.set_num_threads(1) first"
        )
    return has_kernel(x) and not _forked_after_openmp


def compiled(kernel: Callable[..., None]) -> Callable[..., None]:
    """The kernel compiled by numba for one thread."""
    return _compile(kernel)


def compiled_parallel(kernel: Callable[..., None]) -> Callable[..., None]:
    """The kernel compiled by numba, its `prange` loops on as many threads as torch uses; safe in several threads."""
    import numba

    # Sums may be reordered, so that they run as SIMD; NaN and infinity keep their meaning.
    inner = _compile(kernel, parallel=True, fastmath={"reassoc", "contract"})

    @wraps(kernel)
    def run(*args: object) -> None:
        n_threads = torch.get_num_threads()
        numba.set_num_threads(min(n_threads, numba.config.NUMBA_NUM_THREADS))  # pyright: ignore
        if torch.get_num_threads() != n_threads:  # numba's first OpenMP call changes it, as both use one OpenMP
            torch.set_num_threads(n_threads)
        layer = numba.threading_layer()  # pyright: ignore[reportPrivateImportUsage]
        with _workqueue_lock if layer == "workqueue" else nullcontext():
            inner(*args)

    return run


def _compile(kernel: Callable[..., None], **options: Any) -> Callable[..., None]:
    import numba

    plain = unwrap(kernel)  # the test run wraps every function in a check of its types
    try:
        return numba.njit(cache=True, nogil=True, **options)(plain)
    except RuntimeError:  # numba found no folder to keep compiled code in: compile once per process
        return numba.njit(nogil=True, **options)(plain)


def _after_fork() -> None:
    """Note in a forked process what it inherited: numba's OpenMP threads, and perhaps a lock that is held."""
    global _forked_after_openmp, _workqueue_lock
    _workqueue_lock = Lock()
    if numba := sys.modules.get("numba"):
        with suppress(ValueError):  # raised while no parallel kernel has run
            _forked_after_openmp |= numba.threading_layer() == "omp"


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)
