"""What a run shows of its losses while it works."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from statistics import fmean

from bridges.fitting.gradients import StepLosses


def summary(losses: StepLosses) -> str:
    """A step's losses on one line, each a mean over its sites; both directions are divided by a slash."""
    nmse = f"{_mean(losses.nmse_encode):.2f}/{_mean(losses.nmse_decode):.2f}"
    kl = f"{_mean(losses.kl_dense_to_sparse):.2f}/{_mean(losses.kl_sparse_to_dense):.2f}"
    text = f"loss {losses.loss:.3f} nmse {nmse} kl {kl}"
    return text if losses.ce is None else f"{text} ce {losses.ce:.2f}"


def _mean(losses: Mapping[str, float]) -> float:
    """NaN where no site's target varies."""
    return fmean(losses.values()) if losses else nan
