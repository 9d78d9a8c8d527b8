"""Constant edits against loops, on a tiny random pair in float64."""

import numpy as np
import pytest
import torch
from pairs import gpt2, join, sparse_model, toy_task, with_units
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


def test_edits_between_models_in_half_precision_have_the_precision_of_the_bridge():
    pair = with_units(join(gpt2(dtype=torch.bfloat16), sparse_model(dtype=torch.bfloat16)))
    task = toy_task()
    with torch.no_grad():
        before, after = (
            pair.sparse.reads(ids, task.attention_mask, [2])[0].double()
            for ids in (task.input_ids, task.counterfactual_ids)
        )
    # The difference of two reads in their own precision is what any edit takes.
    dn = (after.bfloat16() - before.bfloat16()).double()
    found = constant_edits(pair.dense.model, pair.sparse.model, pair.bridge_set, CHOSEN, task, check_models=False)
    for edit in found:
        rows = dn[0::2, :, edit.channel]
        expected = np.mean([row[row.abs().argmax()].item() for row in rows])
        assert edit.value == pytest.approx(expected, rel=1e-6)
