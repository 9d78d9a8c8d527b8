"""counterfactual(): the other prompt's reading as an edit."""

import pytest
import torch
from pairs import MASK, tokens
from steered import CHANNEL, SITE

from bridges.steering import counterfactual as module
from bridges.steering.counterfactual import counterfactual


def test_a_counterfactual_is_zero_on_padding_and_checks_its_arguments(pair):
    ids = tokens()
    edit = counterfactual(pair.sparse.model, SITE, CHANNEL, ids, ids.flip(0), MASK)
    assert not edit.value[MASK == 0].any() and edit.value[MASK == 1].any()
    with pytest.raises(ValueError, match=r"input_ids \(4, 7\) and counterfactual_ids \(4, 6\)"):
        counterfactual(pair.sparse.model, SITE, CHANNEL, ids, ids[:, 1:])


@pytest.mark.parametrize(
    ("channel", "message"),
    [
        (12, "channel=12 must lie between 0 and 11, the sparse stream's channels"),
        ([3, 12], "channel=12 must lie between 0 and 11"),
        ([True], "channel=True must lie"),
        ([1.5], "channel=1.5 must lie"),
        ([], r"channel=\[\] must be a channel's number, or a list of one or more"),
        ("3", "channel='3' must be a channel's number"),
    ],
)
def test_channels_that_do_not_exist_are_refused(pair, unchecked, channel, message):
    with pytest.raises(ValueError, match=message):
        counterfactual(pair.sparse.model, SITE, channel, tokens(), tokens().flip(0))


def test_several_channels_come_from_the_same_two_passes(pair):
    """Each edit is what it is alone; no sublayer after the site runs, and no unembedding."""
    ids, model, calls = tokens(), pair.sparse.model, []
    modules = {"0": model.blocks[0].mlp, "1": model.blocks[1].mlp, "unembedding": model.lm_head}
    handles = [one.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, one in modules.items()]
    several = counterfactual(model, SITE, (7, CHANNEL, 3), ids, ids.flip(0), MASK)
    assert SITE == "1.attn" and calls == ["0", "0"]
    for handle in handles:
        handle.remove()
    assert [edit.channel for edit in several] == [7, CHANNEL, 3]
    for edit in several:
        alone = counterfactual(model, SITE, edit.channel, ids, ids.flip(0), MASK)
        assert (edit.site, edit.mode, edit.positions) == (alone.site, alone.mode, alone.positions)
        assert torch.equal(edit.value, alone.value)


@pytest.mark.parametrize("site", [SITE, "final"])
def test_values_are_differences_of_the_whole_passes_reads(pair, site):
    ids = tokens()
    with torch.no_grad():
        before, after = (pair.sparse.reads(x, MASK)[pair.sparse.index(site)] for x in (ids, ids.flip(0)))
    edit = counterfactual(pair.sparse.model, site, CHANNEL, ids, ids.flip(0), MASK)
    assert torch.allclose(edit.value, (after - before)[..., CHANNEL] * MASK, rtol=1e-12, atol=1e-14)


def test_rows_run_in_batches_and_give_what_they_give_together(pair, monkeypatch):
    ids, sizes = tokens(), []
    whole = counterfactual(pair.sparse.model, SITE, CHANNEL, ids, ids.flip(0), MASK)
    monkeypatch.setattr(module, "MAX_TOKENS", 15)
    handle = pair.sparse.model.blocks[0].mlp.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    split = counterfactual(pair.sparse.model, SITE, CHANNEL, ids, ids.flip(0), MASK)
    handle.remove()
    assert sizes == [2] * 4
    assert torch.allclose(split.value, whole.value, rtol=1e-12, atol=1e-14)
