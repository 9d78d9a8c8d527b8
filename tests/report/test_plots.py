import os
import struct

import numpy as np
from figures import STEERING, report
from matplotlib.image import imread

from bridges.report.plots import quality_plot, steering_plot


def drawn(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and os.listdir(path.parent) == [path.name]
    picture = imread(path)
    assert picture.shape[:2] == struct.unpack(">II", data[16:24])[::-1] and min(picture.shape[:2]) > 300
    assert len(np.unique(picture[..., 0])) > 20  # text and lines have many shades of red, an empty page one
    return picture


def test_quality_is_drawn_from_the_figures(tmp_path):
    small, large = tmp_path / "a" / "quality.png", tmp_path / "b" / "quality.png"
    assert quality_plot(report(), small) == small
    quality_plot(report(n=5), large)
    assert not np.array_equal(drawn(small), drawn(large))


def test_a_figure_of_zero_does_not_break_the_logarithm(tmp_path):
    drawn(quality_plot(report(scale=0.0), tmp_path / "quality.png"))


def test_every_curve_is_drawn(tmp_path):
    curves = [key for key in STEERING if key.startswith("p_target")]
    moved = [STEERING] + [STEERING | {curve: [0.05, 0.1, 0.2]} for curve in curves]
    paths = [steering_plot(figures, tmp_path / f"{i}.png") for i, figures in enumerate(moved)]
    assert len({path.read_bytes() for path in paths}) == len(curves) + 1 == 8


def test_a_picture_replaces_the_old_one(tmp_path):
    path = tmp_path / "steering.png"
    path.write_text("old")
    assert steering_plot(STEERING, str(path)) == path
    drawn(path)


def test_a_second_edit_stands_beside_the_first(tmp_path):
    one = drawn(steering_plot(STEERING, tmp_path / "a" / "s.png"))
    few = STEERING | {"channel": [7, 9], "p_target": [0.01, 0.6, 0.95]}
    both = drawn(steering_plot(STEERING | {"few_channels": few}, tmp_path / "b" / "s.png"))
    assert both.shape[0] == one.shape[0] and both.shape[1] > 1.5 * one.shape[1]
    again = steering_plot(STEERING | {"few_channels": STEERING}, tmp_path / "c" / "s.png")
    assert not np.array_equal(drawn(again), both)
