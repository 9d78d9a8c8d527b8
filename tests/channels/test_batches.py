"""Budgets of memory: results do not depend on how prompts and text are split, and no batch is over its budget."""

import pytest
import torch
from pairs import MASK, tokens, toy_task
from whole import whole_run, written_p, written_p_target

from bridges.channels import agreement, batches, curves, reference_text, runs
from bridges.channels.agreement import intervention_agreement
from bridges.channels.attribution import predicted_effects
from bridges.channels.baselines import best_mean_difference
from bridges.channels.batches import pair_batches, row_batches, token_chunks
from bridges.channels.constant_edits import constant_changes
from bridges.channels.curves import edit_curves
from bridges.channels.prompts import Channels
from bridges.channels.reference_text import ReferenceText
from bridges.channels.runs import Prompts, p_target_under_edits, p_target_unedited
from bridges.channels.side_effects import side_effects

CHOSEN = Channels("1.attn", (0, 3), "residual")


def padded_task(rows=6):
    """Prompts of four to seven tokens, long and short in turn, padded on the left."""
    pairs = toy_task(rows=rows)
    starts = torch.arange(rows) * 2 % 5 % 4
    mask = (torch.arange(7) >= starts[:, None]).long()
    return pairs.replaced(attention_mask=mask, counterfactual_ids=pairs.input_ids.roll(1, 0))


@pytest.fixture
def few_passes(monkeypatch):
    """Two random directions and one strength, since what is asked is how prompts are split."""
    monkeypatch.setattr(curves, "RANDOM_DIRECTIONS", 2)
    monkeypatch.setattr(agreement, "AGREEMENT_STRENGTHS", (1.0,))


@pytest.fixture
def small_budgets(monkeypatch):
    """Two prompts, nine tokens or forty logits at once, and nothing kept."""
    monkeypatch.setattr(batches, "MAX_TOKENS", 9)
    monkeypatch.setattr(batches, "MAX_LOGITS", 40)
    for module in (runs, reference_text):
        monkeypatch.setattr(module, "KEPT_BYTES", 0)


@pytest.mark.parametrize(
    ("budget", "at_most"), [({"MAX_TOKENS": 10}, 10), ({"MAX_LOGITS": 40}, 14), ({"STREAM_BYTES": 1300}, 13)]
)
def test_every_pair_is_in_one_batch_without_the_padding_that_all_begin_with(monkeypatch, budget, at_most):
    for name, value in budget.items():
        monkeypatch.setattr(batches, name, value)
    task = padded_task(8)
    split = pair_batches(task, bytes_per_token=100, vocab_size=17)
    assert sorted(row for rows, _ in split for row in rows.tolist()) == list(range(8)) and len(split) > 2
    for rows, pairs in split:
        n, width = pairs.input_ids.shape
        assert n * width <= at_most or n == 1
        assert pairs.attention_mask[:, 0].any()
        for row, ids, other in zip(rows.tolist(), pairs.input_ids, pairs.counterfactual_ids, strict=True):
            assert torch.equal(ids, task.input_ids[row, -width:]) and not task.attention_mask[row, :-width].any()
            assert torch.equal(other, task.counterfactual_ids[row, -width:])
        assert torch.equal(pairs.answers, task.answers[rows]) and torch.equal(pairs.direction, task.direction[rows])


def test_text_and_logits_are_split_by_tokens_and_logits(small_budgets):
    assert [len(rows) for rows in row_batches(tokens(5, 4))] == [2, 2, 1]
    assert [len(rows) for rows in row_batches(tokens(2, 12))] == [1, 1]
    assert [chunk.tolist() for chunk in token_chunks(1, 5, 17)] == [[0, 1], [2, 3], [4]]
    assert [chunk.tolist() for chunk in token_chunks(3, 2, 17)] == [[0], [1]]


def test_prompts_in_small_batches_give_what_one_batch_gives(pair, small_budgets):
    """P(target) of edits at every site, against one pass on all prompts, padding and all."""
    prompts, run = Prompts(pair, padded_task()), whole_run(pair, padded_task())
    assert len(prompts.batches) > 3  # of six
    edits = [Channels(site, (1, 4), at) for site in pair.bridge_set.sites for at in ("read", "residual")]
    for side in ("dense", "sparse"):
        with torch.no_grad():
            found = p_target_under_edits(pair, prompts, edits, side)
            unedited = p_target_unedited(pair, prompts, side)
        assert torch.allclose(unedited, written_p(run.traces.side(side).logits, run.pairs.targets), rtol=1e-10)
        for row, chosen in zip(found, edits, strict=True):
            assert torch.allclose(row, written_p_target(pair, run, chosen, side=side), rtol=1e-10)
    assert not prompts._kept


def everything(pair, prompts, at="residual"):
    """Figures of each function that runs prompts or text, as tensors."""
    text, chosen = tokens(3, 8, seed=9), CHOSEN._replace(at=at)
    with torch.no_grad():
        effects = side_effects(pair, prompts, chosen, text, [padded_task(4)])
        site, vectors = best_mean_difference(pair.dense, prompts)
        found = {
            "ablation": [ReferenceText(pair, text, {2: [0, 3, 5]}).ablation_kl(chosen)],
            "side effects": [x for x in effects if isinstance(x, float)] + list(effects.solved_other_tasks),
            "constant changes": constant_changes(prompts, 2, (0, 3)),
            "agreement": list(intervention_agreement(pair, prompts, chosen)),
            "mean difference": vectors,
            "its site": [site],
        }
        found |= edit_curves(pair, prompts, prompts, chosen, (0.0, 1.0))
    return found | {f"effects {at}": values for at, values in predicted_effects(pair, prompts).items()}


@pytest.mark.parametrize("at", [pytest.param("read", marks=pytest.mark.slow), "residual"])
def test_figures_do_not_depend_on_the_batches(pair, few_passes, request, at):
    whole = everything(pair, Prompts(pair, padded_task()), at)
    request.getfixturevalue("small_budgets")
    split = everything(pair, Prompts(pair, padded_task()), at)
    for name, values in whole.items():
        one, other = torch.as_tensor(values), torch.as_tensor(split[name])
        precise = 1e-4 if name == "p_target_probe" else 1e-9  # a logistic regression is solved up to a tolerance
        assert torch.allclose(one, other, rtol=precise, atol=1e-12), name


def largest_call(module, run):
    """The most rows and tokens that a module was given at once."""
    sizes = [0]
    handle = module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[:-1].numel()))
    with torch.no_grad():
        run()
    handle.remove()
    return max(sizes)


@pytest.mark.slow
def test_no_call_is_over_its_budget(pair, few_passes, small_budgets):
    """Two tokens' logits of a vocabulary of 17, nine tokens of a layer."""
    model = pair.dense.model
    prompts = Prompts(pair, padded_task(6))
    assert largest_call(model.lm_head, lambda: everything(pair, prompts)) == 2
    assert largest_call(model.transformer.h[0].mlp, lambda: everything(pair, prompts)) <= 9


def test_an_edits_logits_are_computed_at_the_last_token_alone(pair):
    prompts = Prompts(pair, toy_task())
    calls = []
    handle = pair.dense.model.lm_head.register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape)))
    with torch.no_grad():
        p_target_under_edits(pair, prompts, [CHOSEN, CHOSEN._replace(at="read")])
    handle.remove()
    assert calls == [(6, 1, 8)] * 2


def test_passes_that_are_small_run_once(pair, monkeypatch):
    prompts = Prompts(pair, padded_task())
    first = [run.dz[2] for run in prompts.runs([0, 2])]
    assert all(one is other.dz[2] for one, other in zip(first, prompts.runs([2]), strict=True))
    monkeypatch.setattr(runs, "KEPT_BYTES", 0)
    again = [run.dz[1] for run in prompts.runs([1])]
    assert again[0] is not next(iter(prompts.runs([1]))).dz[1]


def test_padding_masks_of_every_shape_are_taken(pair):
    """The last token must be real, as it is in pairs that are padded on the left."""
    rows = MASK[[0, 1]]
    prompts = Prompts(pair, toy_task(rows=2).replaced(attention_mask=rows))
    run = whole_run(pair, prompts.pairs)
    with torch.no_grad():
        found = p_target_under_edits(pair, prompts, [CHOSEN])[0]
    assert torch.allclose(found, written_p_target(pair, run, CHOSEN), rtol=1e-10)
