"""The curves of a sweep: their names in files, their labels, and how they are drawn."""

from __future__ import annotations

from typing import NamedTuple

DENSE_COLOR, SPARSE_COLOR = "#1b5e9f", "#b3530b"
"""Of the dense model and the encoder, of the sparse model and the decoder: as on the page."""


class CurveStyle(NamedTuple):
    """How one curve is named and drawn."""

    label: str
    linestyle: str
    linewidth: float
    color: str


CURVES = {
    "p_target": CurveStyle("the edit, through the bridge", "-", 2.5, DENSE_COLOR),
    "p_target_random_direction": CurveStyle("random directions of the same norm", "-", 1.2, "#555555"),
    "p_target_mean_difference_equal_norm": CurveStyle(
        "dense mean difference at the edit's site, same norm", "-.", 1.0, "#888888"
    ),
    "p_target_probe": CurveStyle("a linear probe at the edit's site, same norm", "--", 1.0, "#b0a060"),
    "p_target_mean_difference": CurveStyle(
        "the dense model's mean difference, at its best site and norm", "-.", 1.5, "#3a7d44"
    ),
    "p_target_all_channels": CurveStyle("all channels through the bridge", "--", 1.5, "#7a5195"),
    "p_target_sparse_model": CurveStyle("the same edit inside the sparse model", "--", 2.5, SPARSE_COLOR),
}
"""By name in `steering.json`: the edit itself, then what it is compared with."""
BASELINES = {name: style for name, style in CURVES.items() if name != "p_target"}
