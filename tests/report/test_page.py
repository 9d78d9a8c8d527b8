"""The demo's page, read back as text."""

import base64
import html
import re

import pytest
from figures import STEERING, report

from bridges.report.curves import BASELINES
from bridges.report.page import write_page

PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")
EXTRAS = {
    "at": "residual",
    "p_target_by_direction": [0.111, 0.222],
    "side_effects": {"kl": 0.333, "tokens": 4321},
    "agreement": {"r_squared": 0.44, "r_squared_shuffled": 0.05},
}
FEW = STEERING | EXTRAS | {"channel": [7, 9], "site": "0.mlp"}


@pytest.fixture
def folder(tmp_path):
    for name in ("quality", "steering"):
        (tmp_path / f"{name}.png").write_bytes(PIXEL)
    return tmp_path


def test_the_page_embeds_its_plots_and_shows_every_figure(folder):
    steering = STEERING | EXTRAS | {"few_channels": FEW}
    page = write_page(report(), steering, folder).read_text()
    assert page.count(f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}") == 2
    for site in report().sites:
        row = next(row for row in page.split("<tr") if f"<td>{site.name}</td>" in row)
        for name in ("nmse_encode", "nmse_decode", "kl_dense_to_sparse", "kl_sparse_to_dense"):
            assert f"{getattr(site, name):.3f}" in row
    for shown in ("Channel 7", "[7, 9] at 0.mlp", "0.111", "0.222", "0.333", "4321", "44 %", "5 %"):
        assert shown in page
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in html.unescape(page).split("<tr>") if row.startswith("<td>")]
    for name, style in BASELINES.items():
        assert [style.label, *(f"{p:.3f}" for p in STEERING[name])] in rows
    assert ["one channel", *(f"{p:.3f}" for p in STEERING["p_target"])] in rows


def test_a_missing_control_is_named(folder):
    few = FEW | {"agreement": {"r_squared": 0.44, "r_squared_shuffled": None}}
    assert "there are none" in write_page(report(), STEERING | EXTRAS | {"few_channels": few}, folder).read_text()


def test_text_is_escaped(folder):
    steering = STEERING | EXTRAS | {"few_channels": FEW, "task": "<b>bold</b>"}
    assert "&lt;b&gt;bold" in write_page(report(), steering, folder).read_text()
