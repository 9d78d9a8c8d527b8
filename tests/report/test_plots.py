"""What the plots show: lines, heights, labels and limits of the figures, and the PNG that is written."""

import numpy as np
import pytest
from figures import STEERING, report
from matplotlib.image import imread

from bridges.report.curves import CURVES
from bridges.report.plots import quality_figure, quality_plot, steering_figure, steering_plot

WAYS = ("dense_to_sparse", "sparse_to_dense")
FEW = STEERING | {"channel": [7, 9], "p_target": [0.01, 0.6, 0.95]}


def lines(axes):
    """The labelled lines of a plot."""
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def bar_heights(axes):
    return {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}


def test_bars_are_the_reports_figures_per_site():
    left, right = quality_figure(report()).axes
    for axes, names in ((left, ("nmse_encode", "nmse_decode")), (right, ("kl_dense_to_sparse", "kl_sparse_to_dense"))):
        assert bar_heights(axes) == {name: [getattr(site, name) for site in report().sites] for name in names}
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.attn", "1.attn", "2.attn"]


def test_every_control_is_marked_in_the_middle_of_its_bar():
    left, right = quality_figure(report()).axes
    expected = [
        (left, ["nmse_encode"], ["nmse_encode_floor"]),
        (right, ["kl_dense_to_sparse", "kl_sparse_to_dense"], [f"kl_{way}_mean_ablation" for way in WAYS]),
    ]
    for axes, names, controls in expected:
        bars = {container.get_label(): container for container in axes.containers}
        marks = [line for line in axes.get_lines() if line.get_marker() == "_" and len(line.get_xdata())]
        for name, control, mark in zip(names, controls, marks, strict=True):
            assert list(mark.get_ydata()) == [getattr(site, control) for site in report().sites]
            centres = [bar.get_x() + bar.get_width() / 2 for bar in bars[name]]
            assert list(mark.get_xdata()) == pytest.approx(centres)
            assert f"control: {control}" in lines(axes)


def test_kl_is_on_a_log_scale_with_the_sparse_model_alone_and_nmse_starts_at_zero():
    left, right = quality_figure(report()).axes
    assert left.get_yscale() == "linear" and left.get_ylim()[0] == 0
    assert right.get_yscale() == "log"
    assert set(lines(right)["sparse model alone"].get_ydata()) == {report().kl_sparse_alone}


def test_every_curve_is_drawn_with_its_band_and_label():
    (axes,) = steering_figure(STEERING).axes
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "strength"
    assert axes.get_title() == "single_double_quote: channel 7 at 1.attn"
    assert "64 prompts" in axes.get_ylabel()
    assert len(lines(axes)) == len(axes.collections) == len(CURVES) == 7
    for (name, style), band in zip(CURVES.items(), axes.collections, strict=True):
        line = lines(axes)[style.label]
        assert list(line.get_xdata()) == STEERING["strengths"] and list(line.get_ydata()) == STEERING[name]
        corners = band.get_paths()[0].vertices[:, 1]
        assert corners.min() == min(STEERING["bands"][name]["low"])
        assert corners.max() == max(STEERING["bands"][name]["high"])


def test_all_curves_are_within_the_limits():
    (axes,) = steering_figure(STEERING).axes
    low, high = axes.get_ylim()
    assert all(low < p < high for name in CURVES for p in STEERING[name])


def test_a_second_edit_gets_a_panel_of_its_own_on_the_same_scale():
    figure = steering_figure(STEERING | {"few_channels": FEW})
    one, few = figure.axes
    assert few.get_title() == "single_double_quote: channels 7, 9 at 1.attn"
    label = CURVES["p_target"].label
    assert list(lines(one)[label].get_ydata()) == STEERING["p_target"]
    assert list(lines(few)[label].get_ydata()) == FEW["p_target"]
    assert one.get_ylim() == few.get_ylim()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [style.label for style in CURVES.values()]
    assert figure.get_figwidth() == 2 * steering_figure(STEERING).get_figwidth()


def test_a_picture_replaces_the_old_file(tmp_path):
    path = tmp_path / "steering.png"
    path.write_text("old")
    assert steering_plot(STEERING, str(path)) == path
    assert [file.name for file in tmp_path.iterdir()] == ["steering.png"]
    assert min(imread(path).shape[:2]) > 300


def test_the_legend_is_inside_the_picture(tmp_path):
    """Text that is cut off at the border leaves dark pixels in the outermost columns."""
    for steering in (STEERING, STEERING | {"few_channels": FEW}):
        picture = imread(steering_plot(steering, tmp_path / "steering.png"))[..., :3]
        assert np.all(picture[:, [0, -1]] == 1)


def test_figures_of_zero_are_bars_of_height_zero_on_a_log_scale(tmp_path):
    left, right = quality_figure(report(scale=0.0)).axes
    assert bar_heights(left) == {"nmse_encode": [0, 0, 0], "nmse_decode": [0, 0, 0]}
    assert bar_heights(right) == {f"kl_{way}": [0, 0, 0] for way in WAYS}
    assert left.get_yscale() == "linear" and right.get_yscale() == "log" and right.get_ylim()[0] > 0
    assert min(imread(quality_plot(report(scale=0.0), tmp_path / "quality.png")).shape[:2]) > 300
