"""Plots of a run, drawn from its figures alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridges.bridge_report import BridgeReport
from bridges.io.files import replacing
from bridges.report.curves import CURVES, DENSE_COLOR, SPARSE_COLOR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONTROL_COLOR = "#555555"
MOST_SIDE_BY_SIDE = 12
"""Sites that have room beside one another in half a figure."""
BAR_OFFSETS, BAR_WIDTH = (-0.2, 0.2), 0.38


def quality_plot(report: BridgeReport, path: str | Path) -> Path:
    """Write `quality_figure` as a PNG to `path`, which is returned."""
    return _save(quality_figure(report), Path(path))


def steering_plot(steering: dict[str, Any], path: str | Path) -> Path:
    """Write `steering_figure` as a PNG to `path`, which is returned."""
    return _save(steering_figure(steering), Path(path))


def quality_figure(report: BridgeReport) -> Figure:
    """Draw NMSE and KL per site, each with its control."""
    from matplotlib.figure import Figure

    many = len(report.sites) > MOST_SIDE_BY_SIDE
    # Many sites: one panel under the other, as wide as their bars need.
    size = (max(11.0, 0.3 * len(report.sites)), 9) if many else (11, 5)
    figure = Figure(figsize=size, layout="constrained")
    left, right = figure.subplots(2, 1) if many else figure.subplots(1, 2)
    _draw_sites(left, report, ("nmse_encode", "nmse_decode"), ("nmse_encode_floor", None))
    left.set(title="Reconstruction, held-out", ylabel="NMSE (1 = predicting the mean)", ylim=(0, None))
    kls = ("kl_dense_to_sparse", "kl_sparse_to_dense")
    _draw_sites(right, report, kls, [f"{kl}_mean_ablation" for kl in kls])
    right.axhline(report.kl_sparse_alone, color="black", linestyle=":", label="sparse model alone")
    right.set(title="Hybrid passes, held-out", ylabel="KL from the dense model, nats per token", yscale="log")
    for axes in (left, right):
        if many:
            axes.tick_params("x", rotation=90, labelsize=8)
            axes.margins(x=0.01)
        axes.legend(
            fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.25 if many else -0.1), ncols=2
        )
    return figure


def _draw_sites(axes: Axes, report: BridgeReport, names: Sequence[str], controls: Sequence[str | None]) -> None:
    """Two bars per site, and a mark at the height of each one's control."""
    sites = range(len(report.sites))
    colors = (DENSE_COLOR, SPARSE_COLOR)
    for name, control, color, offset in zip(names, controls, colors, BAR_OFFSETS, strict=True):
        x = [site + offset for site in sites]
        axes.bar(x, [getattr(site, name) for site in report.sites], BAR_WIDTH, color=color, label=name)
        if control is not None:
            heights = [getattr(site, control) for site in report.sites]
            size = 18 if len(report.sites) <= MOST_SIDE_BY_SIDE else 5
            axes.plot(x, heights, "_", color=CONTROL_COLOR, markersize=size, markeredgewidth=2.5)
            # The legend's mark is smaller than those in the plot.
            axes.plot([], [], "_", color=CONTROL_COLOR, markeredgewidth=2.5, label=f"control: {control}")
    axes.set_xticks(list(sites), [site.name for site in report.sites])
    axes.spines[["top", "right"]].set_visible(False)


def steering_figure(steering: dict[str, Any]) -> Figure:
    """Draw P(target) over strengths with every baseline, log scale (paper, figure 9).

    `steering` is the content of `steering.json`. A second edit in it, `few_channels`, gets a panel of its own on the
    same scale.
    """
    from matplotlib.figure import Figure

    edits = [steering, *([steering["few_channels"]] if "few_channels" in steering else [])]
    figure = Figure(figsize=(6.8 * len(edits), 5.2), layout="constrained")
    panels = figure.subplots(1, len(edits), sharey=True, squeeze=False)[0]
    for axes, edit in zip(panels, edits, strict=True):
        _draw_curves(axes, edit)
    panels[0].set_ylabel(f"P(target), mean over {steering['prompts']} prompts, 95 % band")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, frameon=False, loc="outside lower center", ncols=2 * len(edits))
    return figure


def _draw_curves(axes: Axes, steering: dict[str, Any]) -> None:
    strengths = steering["strengths"]
    for name, style in CURVES.items():
        line = {"linestyle": style.linestyle, "linewidth": style.linewidth, "label": style.label}
        axes.plot(strengths, steering[name], color=style.color, **line)
        band = steering["bands"][name]
        axes.fill_between(strengths, band["low"], band["high"], color=style.color, alpha=0.12, linewidth=0)
    channels = steering["channel"]
    what = f"channel {channels}" if isinstance(channels, int) else f"channels {', '.join(map(str, channels))}"
    axes.set_title(f"{steering['task']}: {what} at {steering['site']}", fontsize=10)
    axes.set(xlabel="strength", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
