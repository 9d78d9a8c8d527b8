"""What steer() leaves as it was: bits, hooks, attributes, modes."""

import copy

import pytest
import torch
from pairs import gpt2, join, sparse_model, tokens, with_units
from steered import EDITS, logits, steered

from bridges.steering.edits import Edit


@pytest.mark.parametrize("at", ["read", "residual"])
@pytest.mark.parametrize("edits", [[], *EDITS.values()], ids=["none", *EDITS])
def test_strength_zero_and_no_edits_change_no_bit(edits, at):
    pair = with_units(join(gpt2(dtype=torch.float32), sparse_model(dtype=torch.float32)))
    plain, strength = logits(pair, tokens()), 0.0 if edits else 1.0
    with steered(pair, edits, strength=strength, at=at):
        assert torch.equal(logits(pair, tokens()), plain)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in pair.dense.model.modules())
        assert not {"forward", "generate"} & set(vars(pair.dense.model))


@pytest.mark.parametrize("at", ["read", "residual"])
@pytest.mark.parametrize("site", ["0.attn", "0.mlp", "1.attn", "1.mlp", "final"])
def test_positions_before_an_edited_one_keep_every_bit(site, at):
    pair = with_units(join(gpt2(dtype=torch.float32), sparse_model(dtype=torch.float32)))
    plain = logits(pair, tokens())
    with steered(pair, Edit(site, 1, 2.0, positions=4), at=at):
        found = logits(pair, tokens())
    assert torch.equal(found[:, :4], plain[:, :4]) and not torch.equal(found[:, 4], plain[:, 4])
    assert torch.equal(found[:, 5:], plain[:, 5:]) == (site in ("1.mlp", "final"))


@pytest.mark.parametrize("at", ["read", "residual"])
def test_the_model_is_left_clean_by_an_exception(pair, at):
    plain = logits(pair, tokens())
    own = {module: set(vars(module)) for module in pair.dense.model.modules()}
    with pytest.raises(KeyError, match="mine"), steered(pair, EDITS["several"], at=at, source="encoder"):
        logits(pair, tokens())
        raise KeyError("mine")
    assert {module: set(vars(module)) for module in pair.dense.model.modules()} == own
    for model in (pair.dense.model, pair.sparse.model):
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(logits(pair, tokens()), plain)


def test_training_mode_and_gradients_stay_as_they_were(pair):
    pair.dense.model.train()
    pair.sparse.model.train()
    with steered(pair, EDITS["several"]):
        logits(pair, tokens())
    assert pair.dense.model.training and pair.sparse.model.training
    assert all(p.requires_grad for p in pair.dense.model.parameters())


def test_a_steered_model_is_not_copied(pair):
    """The copy would have some of the edits for good."""
    for edits in (EDITS["add"], EDITS["several"]):
        with steered(pair, edits), pytest.raises(ValueError, match="leave steer\\(\\) to copy it"):
            copy.deepcopy(pair.dense.model)
    copy.deepcopy(pair.dense.model)
