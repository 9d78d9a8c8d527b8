"""What stops a run in time: figures that are not finite, and a user's Ctrl-C."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bridges.fitting.gradients import StepLosses


def refuse_not_finite(losses: StepLosses, step: int) -> None:
    """FloatingPointError, naming step, site and direction, where a loss is not finite."""
    for name in ("nmse_encode", "nmse_decode", "kl_dense_to_sparse", "kl_sparse_to_dense", "interchange"):
        for site, value in getattr(losses, name).items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"step {step}: {name} at site {site} is {value}; the last good checkpoint stays. "
                    "Lower lr (or sparse_lr), or look for tokens that make a model overflow"
                )
    if losses.ce is not None and not math.isfinite(losses.ce):
        raise FloatingPointError(f"step {step}: the sparse model's cross-entropy is {losses.ce}; lower sparse_lr")


def refuse_not_finite_gradients(parameters: Iterable[Tensor], step: int) -> None:
    """A loss may be finite where its gradient overflows, in float16 above all; a checkpoint must not keep that."""
    # A tensor whose every entry is zero has an empty support, so an empty gradient.
    grads = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]
    if grads and not torch.nn.utils.get_total_norm(grads, math.inf).isfinite():
        raise FloatingPointError(
            f"step {step}: a gradient is not finite though the losses are; the last good checkpoint stays. "
            "Lower lr (or sparse_lr), or use mixed_precision='bf16' in place of 'fp16'"
        )


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the handlers before come back after it, and at the end."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(*_: Any) -> None:
        event.set()
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield event
    finally:
        restore()
