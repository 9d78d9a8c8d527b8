import os
import struct

import numpy as np
from matplotlib.image import imread

from bridges.quality import BridgeReport, SiteFigures
from bridges.report.plots import quality_plot, steering_plot

STEERING = {
    "task": "single_double_quote",
    "site": "1.attn",
    "channel": 7,
    "strengths": [0.0, 1.0, 2.0],
    "p_target": [0.01, 0.3, 0.9],
    "p_target_random_direction": [0.01, 0.01, 0.02],
    "p_target_mean_difference": [0.01, 0.5, 0.8],
    "p_target_all_channels": [0.01, 0.9, 0.99],
    "p_target_sparse_model": [0.02, 0.8, 0.95],
    "p_target_mean_difference_equal_norm": [0.01, 0.2, 0.3],
    "p_target_probe": [0.01, 0.15, 0.25],
    "prompts": 64,
}
STEERING["bands"] = {
    name: {"low": [p / 1.5 for p in curve], "high": [p * 1.2 for p in curve]}
    for name, curve in STEERING.items()
    if name.startswith("p_target")
}


def report(scale=1.0, n=3):
    sites = (SiteFigures(f"{i}.attn", *[scale * (0.1 + 0.1 * j + 0.05 * i) for j in range(10)]) for i in range(n))
    return BridgeReport(tuple(sites), 2.5, 2.75, 0.4, 1000)


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
