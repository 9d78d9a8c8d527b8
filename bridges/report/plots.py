"""Pictures of a run, drawn from its figures alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bridges.bridge_report import BridgeReport
from bridges.io.files import replacing

_COLORS = {"encode": "#1f6f8b", "decode": "#d1603d", "control": "#555555"}


def quality_plot(report: BridgeReport, path: str | Path) -> Path:
    """Reconstruction and KL per site, each beside its control; a PNG at `path`."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _pairs(left, report, ("nmse_encode", "nmse_decode"), ("nmse_encode_floor", None))
    left.set(title="Reconstruction, held-out", ylabel="NMSE (1 = predicting the mean)", ylim=(0, None))
    kls = ("kl_dense_to_sparse", "kl_sparse_to_dense")
    _pairs(right, report, kls, tuple(f"{kl}_mean_ablation" for kl in kls))
    right.axhline(report.kl_sparse_alone, color="black", linestyle=":", label="sparse model alone")
    right.set(title="Hybrid passes, held-out", ylabel="KL from the dense model, nats per token", yscale="log")
    for axes in (left, right):
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    return _save(figure, Path(path))


def _pairs(axes: Axes, report: BridgeReport, names: tuple[str, str], controls: tuple[str | None, ...]) -> None:
    places = range(len(report.sites))
    for name, control, color, offset in zip(names, controls, ("encode", "decode"), (-0.2, 0.2), strict=True):
        values = [getattr(site, name) for site in report.sites]
        axes.bar([place + offset for place in places], values, 0.38, color=_COLORS[color], label=name)
        if control is not None:
            levels = [getattr(site, control) for site in report.sites]
            marks = [place + offset for place in places]
            axes.plot(marks, levels, "_", color=_COLORS["control"], markersize=18, markeredgewidth=2.5)
            axes.plot([], [], "_", color=_COLORS["control"], markeredgewidth=2.5, label=f"control: {control}")
    axes.set_xticks(list(places), [site.name for site in report.sites])
    axes.spines[["top", "right"]].set_visible(False)


_CURVES = {
    "p_target": ("through the bridge", "-", 2.5, "#d1603d"),
    "p_target_sparse_model": ("the same edit, inside the sparse model", ":", 1.8, "#1f6f8b"),
    "p_target_all_channels": ("all channels, through the bridge", "--", 1.5, "#7a5195"),
    "p_target_mean_difference": ("dense mean difference, best site and norm", "-.", 1.5, "#2f4b7c"),
    "p_target_mean_difference_equal_norm": ("dense mean difference there, same norm", "-.", 1.0, "#888888"),
    "p_target_probe": ("linear probe there, same norm", "--", 1.0, "#b0a060"),
    "p_target_random_direction": ("random directions, same norm", "-", 1.2, "#555555"),
}


def steering_plot(steering: dict[str, Any], path: str | Path) -> Path:
    """P(target) over strengths with every baseline, log scale (paper, figure 9); a PNG at `path`.

    Where there is a second edit, `few_channels`, it stands beside the first, on the same scale.
    """
    edits = [steering, *([steering["few_channels"]] if "few_channels" in steering else [])]
    figure = Figure(figsize=(6.8 * len(edits), 5.2), layout="constrained")
    panels = figure.subplots(1, len(edits), sharey=True, squeeze=False)[0]
    for axes, edit in zip(panels, edits, strict=True):
        _curves(axes, edit)
    panels[0].set_ylabel(f"P(target), mean over {steering['prompts']} prompts, 95 % band")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=2 * len(edits))
    return _save(figure, Path(path))


def _curves(axes: Axes, steering: dict[str, Any]) -> None:
    for name, (label, style, width, color) in _CURVES.items():
        axes.plot(steering["strengths"], steering[name], style, color=color, linewidth=width, label=label)
        band = steering["bands"][name]
        axes.fill_between(steering["strengths"], band["low"], band["high"], color=color, alpha=0.12, linewidth=0)
    channels = steering["channel"]
    what = f"channel {channels}" if isinstance(channels, int) else f"channels {', '.join(map(str, channels))}"
    axes.set_title(f"{steering['task']}: {what} at {steering['site']}", fontsize=10)
    axes.set(xlabel="strength", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
