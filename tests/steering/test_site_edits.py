"""What several edits of one site make of its readings."""

import pytest
import torch
from pairs import gpt2, join, sparse_model, with_units
from steered import SITE

from bridges.steering.edits import Edit, build_site_edit
from bridges.steering.positions import Prompt, TokenSpan

MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
SPAN = TokenSpan(MASK, 0, Prompt(torch.zeros_like(MASK), MASK))


@pytest.fixture(scope="module")
def build():
    pair = with_units(join(gpt2(), sparse_model()))
    return lambda *edits: build_site_edit(pair.dense, pair.sparse, pair.bridge_set, SITE, list(edits), 1.0, "residual")


def test_edits_of_one_channel_apply_in_order_and_change_no_other(build):
    reading = torch.arange(20, dtype=torch.float64).view(2, 5, 2)
    edits = [Edit(SITE, 3, 2.0, "scale"), Edit(SITE, 3, 1.0, "add"), Edit(SITE, 8, 7.0, "set", (0,))]
    found, real = build(*edits).change(SPAN, reading), MASK.bool()
    assert torch.equal(found[..., 0], torch.where(real, 2 * reading[..., 0] + 1, reading[..., 0]) - reading[..., 0])
    expected = torch.zeros(2, 5, dtype=torch.float64)
    expected[0, 0], expected[1, 2] = 7 - reading[0, 0, 1], 7 - reading[1, 2, 1]
    assert torch.equal(found[..., 1], expected)
    swapped = build(edits[1], edits[0]).change(SPAN, reading[..., :1])
    assert swapped[0, 1, 0] == 2 * (reading[0, 1, 0] + 1) - reading[0, 1, 0]


def test_constant_edits_of_a_channel_sum_and_need_no_reading(build):
    constant = build(Edit(SITE, 8, 2.0, "add"), Edit(SITE, 3, 1.0, "add"), Edit(SITE, 8, 0.5, "add"))
    assert constant.constant and constant.reading_mode is None
    assert dict(zip(constant.channels, constant.constant_change().tolist(), strict=True)) == {8: 2.5, 3: 1.0}
    reading = build(Edit(SITE, 3, 2.0, "add"), Edit(SITE, 3, 2.0, "scale"))
    assert not reading.constant and reading.reading_mode == "scale"
