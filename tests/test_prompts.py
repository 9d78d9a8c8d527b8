"""Edits on a task's prompts: what is run once, and what an edit adds to either model."""

import pytest
import torch
from pairs import gpt2, join, sparse_model, toy_task, with_units

from bridges.prompts import Channels, addend_of, edited, logits_under, model_pair, p_target, pairs_of, prompts_of


@pytest.fixture(scope="module")
def pair():
    return with_units(join(gpt2(), sparse_model()))


def test_pairs_that_are_given_are_taken_and_names_need_a_tokenizer(pair):
    given = toy_task()
    assert pairs_of(given, pair.dense.model, None, 3, 0) is given
    with pytest.raises(ValueError, match="task='for_while' needs tokenizer="):
        pairs_of("for_while", pair.dense, None, 3, 0)


def test_both_models_are_frozen_inside_and_as_before_after(pair):
    dense, sparse = pair.dense.model, pair.sparse.model
    dense.train()
    with model_pair(dense, sparse, pair.bridge_set, check_models=False):
        assert not dense.training and not any(p.requires_grad for p in (*dense.parameters(), *sparse.parameters()))
        assert not torch.is_grad_enabled()
    assert dense.training and any(p.requires_grad for p in sparse.parameters())
    dense.eval()


@pytest.mark.parametrize("at", ["read", "residual"])
def test_an_edit_of_the_sparse_model_changes_its_channels_alone(pair, at):
    prompts = prompts_of(pair, toy_task())
    chosen = Channels("1.attn", (0, 3), at)
    addend = addend_of(pair, prompts, chosen, "sparse")
    assert torch.equal(addend[..., [0, 3]], (prompts.reads if at == "read" else prompts.streams)[2][..., [0, 3]])
    assert addend.count_nonzero() == addend[..., [0, 3]].count_nonzero() > 0
    for side, trace in (("dense", prompts.traces.dense), ("sparse", prompts.traces.sparse)):
        assert torch.allclose(logits_under(pair, prompts, chosen, 0.0, side), trace.logits, atol=1e-12)
        assert torch.equal(
            edited(pair, prompts, chosen, 1.0, side),
            p_target(logits_under(pair, prompts, chosen, 1.0, side), prompts.pairs),
        )
