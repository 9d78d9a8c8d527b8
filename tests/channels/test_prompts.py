"""Counterfactual edits on a task's prompts, on a tiny random pair in float64."""

import pytest
import torch
from pairs import join, neox, sparse_model, toy_task, with_units

import bridges
from bridges.channels.attribution import predicted_effects
from bridges.channels.prompts import (
    Channels,
    check_channels,
    entry_points,
    frozen_pair,
    resolve_task,
)
from bridges.channels.runs import Prompts, logits_under_edit


def test_given_pairs_are_used_and_a_task_name_needs_a_tokenizer(pair):
    given = toy_task()
    assert resolve_task(given, pair.dense.model, None, 3, 0) is given
    with pytest.raises(ValueError, match="task='for_while' needs tokenizer="):
        resolve_task("for_while", pair.dense, None, 3, 0)


@pytest.mark.parametrize("field", ["input_ids", "counterfactual_ids", "answers", "targets"])
def test_tokens_that_a_model_does_not_know_are_refused(pair, field):
    task = toy_task()
    wrong = getattr(task, field).clone()
    wrong[2, -1] = 17
    with pytest.raises(
        ValueError, match=f"task='{task.task}' with this tokenizer holds token 17; valid ids are 0 to 16"
    ):
        Prompts(pair, task.replaced(**{field: wrong}))


def test_prompts_longer_than_a_context_are_refused(pair):
    task = toy_task()
    longer = {name: getattr(task, name).repeat(1, 3) for name in ("input_ids", "counterfactual_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r"has rows of \d+ tokens, over the models' context of 12; cut them"):
        Prompts(pair, task.replaced(**longer))


def test_both_models_are_frozen_inside_and_restored_afterwards(pair):
    dense, sparse = pair.dense.model, pair.sparse.model
    dense.train()
    with frozen_pair(dense, sparse, pair.bridge_set, check_models=False):
        assert not dense.training and not any(p.requires_grad for p in (*dense.parameters(), *sparse.parameters()))
        assert not torch.is_grad_enabled()
    assert dense.training and any(p.requires_grad for p in sparse.parameters())
    dense.eval()


def test_a_read_that_two_modules_take_is_no_entry_point():
    """`steer` edits both reads of a parallel block, the search has one addend per edit: it edits the stream alone."""
    pair = with_units(join(neox(), sparse_model()))
    prompts, chosen = Prompts(pair, toy_task()), Channels("1.attn", (0, 3), "residual")
    block = pair.bridge_set.index("1.attn")
    assert entry_points(pair, block) == ("residual",)
    assert (block, "read") not in predicted_effects(pair, prompts)
    with pytest.raises(ValueError, match=r"at='read': site='1.attn' is read by two modules at once"):
        check_channels(pair, chosen._replace(at="read"))
    check_channels(pair, chosen)
    ids, other = prompts.pairs.input_ids, prompts.pairs.counterfactual_ids
    edits = [bridges.counterfactual(pair.sparse, "1.attn", c, ids, other) for c in chosen.channels]
    with torch.no_grad(), bridges.steer(pair.dense, pair.bridge_set, edits, at="residual"):
        steered = pair.dense.model(ids).logits[:, -1]
    (run,) = prompts.runs([block])
    with torch.no_grad():
        torch.testing.assert_close(logits_under_edit(pair, run, chosen), steered, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"channels": (1, 1)}, r"channels=\(1, 1\) must be a tuple of different channels"),
        ({"channels": 1}, "channels=1 must be a tuple"),
        ({"channels": (1.5,)}, "channel=1.5 must lie between 0 and 11"),
        ({"channels": (True,)}, "channel=True must lie"),
    ],
)
def test_channels_that_do_not_exist_are_refused(pair, unchecked, wrong, message):
    with pytest.raises(ValueError, match=message):
        check_channels(pair, Channels("1.attn", (0,), "read")._replace(**wrong))
    with pytest.raises(ValueError, match=r"channels=\(0, 1\) must be bridges.Channels"):
        check_channels(pair, (0, 1))


def test_a_norm_is_measured_once_inside_and_again_afterwards(pair):
    with frozen_pair(pair.dense, pair.sparse, pair.bridge_set, check_models=False) as inside:
        assert all(model.norm(2) is model.norm(2) for model in (inside.dense, inside.sparse))
        before = inside.dense.norm(2).gain.clone()
    with torch.no_grad():
        pair.dense.model.transformer.h[1].ln_1.weight.mul_(2)
        assert torch.allclose(pair.dense.norm(2).gain, 2 * before)
        pair.dense.model.transformer.h[1].ln_1.weight.div_(2)


def test_a_search_inside_inference_mode_is_the_same_as_outside(pair):
    models = pair.dense.model, pair.sparse.model, pair.bridge_set
    with frozen_pair(*models, check_models=False) as inside:
        expected = predicted_effects(inside, Prompts(inside, toy_task()))
    with torch.inference_mode():
        with frozen_pair(*models, check_models=False) as inside:
            found = predicted_effects(inside, Prompts(inside, toy_task()))
            assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert torch.is_inference_mode_enabled()
    assert found.keys() == expected.keys() and all(torch.equal(found[at], expected[at]) for at in found)
    assert not any(effect.is_inference() for effect in found.values())
