"""What stops a run early: figures that are not finite, and a user's Ctrl-C."""

from __future__ import annotations

import math
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.bridge_report import BridgeReport, SiteFigures
from bridges.fitting.gradients import SITE_LOSSES, StepLosses


def refuse_not_finite(losses: StepLosses, step: int) -> None:
    """FloatingPointError, naming step, loss and site, if a loss is not finite, or a gradient.

    A gradient may overflow in float16 where the losses do not.
    """
    for name in SITE_LOSSES:
        for site, value in getattr(losses, name).items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"step {step}: {name} at site {site} is {value}; the last checkpoint is kept. "
                    "Lower lr (or sparse_lr), or look for tokens that make a model overflow"
                )
    if losses.ce is not None and not math.isfinite(losses.ce):
        raise FloatingPointError(f"step {step}: the sparse model's cross-entropy is {losses.ce}; lower sparse_lr")
    if losses.kl_path is not None and not math.isfinite(losses.kl_path):
        raise FloatingPointError(f"step {step}: the KL of a path with several changes is {losses.kl_path}; lower lr")
    if not math.isfinite(losses.largest_gradient):
        raise FloatingPointError(
            f"step {step}: a gradient is not finite though the losses are; the last checkpoint is kept. "
            "Lower lr (or sparse_lr), or use mixed_precision='bf16' in place of 'fp16'"
        )


def largest_gradient(parameters: Iterable[Tensor]) -> Float[Tensor, ""]:
    """The largest magnitude of an entry of any gradient, not finite if one is not; 0 where there is no gradient."""
    # A tensor whose every entry is zero has an empty support, so an empty gradient.
    grads = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]
    return torch.nn.utils.get_total_norm(grads, math.inf)


def warn_of_poor_sites(report: BridgeReport) -> None:
    """Warn of every site where a map is worse than predicting the mean, with the likely reason."""
    for name in ("nmse_encode", "nmse_decode"):
        poor = [site for site in report.sites if getattr(site, name) > 1]
        by_k = [site for site in poor if name == "nmse_encode" and site.nmse_encode_floor > site.nmse_encode / 2]
        _warn(name, by_k, "AbsTopK alone loses most of that (see nmse_encode_floor): pass a larger k")
        few = "there are too few training tokens for the width, or they differ from the held-out ones: pass more data"
        _warn(name, [site for site in poor if site not in by_k], few)


def _warn(name: str, sites: list[SiteFigures], reason: str) -> None:
    if sites:
        named = ", ".join(f"{site.name} ({getattr(site, name):.3g})" for site in sites)
        warnings.warn(f"{name} is over 1, worse than predicting the mean, at {named}; {reason}", stacklevel=4)


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Inside, the first SIGINT or SIGTERM only sets the event; a second one acts as it did before."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # Python lets only the main thread set signal handlers
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
