"""Constant edits against loops, on a tiny random pair in float64."""

import numpy as np
import pytest
from pairs import toy_task
from whole import whole_run

from bridges.channels.constant_edits import constant_changes, constant_edits
from bridges.channels.prompts import Channels

CHOSEN = Channels("1.attn", (0, 3), "residual")


def test_a_constant_change_is_the_mean_over_prompts_of_the_largest_change(pair, prompts):
    found, dz = constant_changes(prompts, 2, (0, 3)), whole_run(pair, prompts.pairs).dz[2]
    for side in (0, 1):
        for channel in range(12):
            rows = dz[side::2, :, channel]
            largest = [row[row.abs().argmax()].item() for row in rows]
            expected = np.mean(largest) if channel in (0, 3) else 0.0
            assert found[side, channel].item() == pytest.approx(expected)


def test_constant_edits_add_those_changes_in_read_units(pair, prompts):
    found = constant_edits(pair.dense.model, pair.sparse.model, pair.bridge_set, CHOSEN, toy_task(), direction=1)
    bridge = pair.bridge_set[2]
    for edit, channel in zip(found, (0, 3), strict=True):
        expected = constant_changes(prompts, 2, (0, 3))[1, channel] * bridge.gain_sparse[channel] / bridge.rms_sparse
        assert (edit.site, edit.channel, edit.constant) == ("1.attn", channel, True)
        assert edit.value == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("chosen", "options", "message"),
    [
        (CHOSEN, {"direction": 2}, "direction=2 must be 0 or 1"),
        (CHOSEN._replace(channels=(12,)), {}, "channel=12 must lie between 0 and 11"),
        (CHOSEN._replace(site="9.mlp"), {}, "site='9.mlp' has no bridge"),
    ],
)
def test_arguments_out_of_range_are_refused(pair, unchecked, chosen, options, message):
    with pytest.raises(ValueError, match=message):
        constant_edits(pair.dense.model, pair.sparse.model, pair.bridge_set, chosen, toy_task(), **options)
