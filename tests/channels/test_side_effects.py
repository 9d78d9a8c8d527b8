"""Side effects against the public context, on a tiny random pair in float64."""

import re

import pytest
import torch
from pairs import tokens, toy_task
from whole import whole_run, written_logits

import bridges
from bridges.channels.constant_edits import constant_changes
from bridges.channels.prompts import Channels
from bridges.channels.runs import Prompts
from bridges.channels.side_effects import PAIRS_PER_OTHER_TASK, other_tasks, side_effects
from bridges.tasks.pairs import TASKS, probability

CHOSEN = Channels("1.attn", (0, 3), "residual")


@pytest.mark.parametrize("at", ["read", "residual"])
def test_side_effects_are_those_of_edits_in_steer(pair, prompts, at):
    """The channels set to 0, and each one's constant added, by the public context on the whole model."""
    text, site, chosen = tokens(5, 8, seed=9), 2, CHOSEN._replace(at=at)
    others = [toy_task(seed=8), toy_task(seed=9, rows=4)]
    found = side_effects(pair, prompts, chosen, text, others)
    bridge, off = pair.bridge_set[site], [bridges.Edit("1.attn", c, 0.0, "set") for c in CHOSEN.channels]

    def logits_with(edits, ids):
        with torch.no_grad(), bridges.steer(pair.dense.model, pair.bridge_set, edits, sparse=pair.sparse.model, at=at):
            return pair.dense.model(ids).logits.log_softmax(-1)

    def kl(plain, logits):
        return (plain.exp() * (plain - logits)).sum(-1).mean().item()

    plain, edited = logits_with([], text), logits_with(off, text)
    assert found.kl == pytest.approx(kl(plain, edited), rel=1e-6) and found.kl > 1e-6
    ce = (plain - edited)[:, :-1].gather(2, text[:, 1:, None]).mean().item()
    assert found.ce_change == pytest.approx(ce, abs=1e-6) and found.tokens == 40
    added = 0.0
    for constants in constant_changes(prompts, site, CHOSEN.channels):
        values = constants * bridge.gain_sparse / bridge.rms_sparse
        edits = [bridges.Edit("1.attn", c, values[c].item(), "add") for c in CHOSEN.channels]
        added += kl(plain, logits_with(edits, text)) / 2
    assert found.kl_added == pytest.approx(added, rel=1e-6)
    p = probability(logits_with(off, prompts.pairs.input_ids)[:, -1], prompts.pairs.targets)
    assert found.p_target_off == pytest.approx(max(p[0::2].mean().item(), p[1::2].mean().item()))
    rows = [(logits_with([], one.input_ids)[:, -1], logits_with(off, one.input_ids)[:, -1]) for one in others]
    plain, edited = (torch.cat(side) for side in zip(*rows, strict=True))
    assert found.kl_other_tasks == pytest.approx(kl(plain, edited), rel=1e-6)
    targets, answers = (torch.cat([getattr(one, name) for one in others]) for name in ("targets", "answers"))
    for logits, part in zip((plain, edited), found.solved_other_tasks, strict=True):
        p_targets, p_answers = (probability(logits, tokens) for tokens in (targets, answers))
        assert part == pytest.approx((p_answers > p_targets).double().mean().item())


def test_the_edits_effect_before_the_answer_is_the_mean_over_real_tokens_but_the_last(pair):
    pairs = toy_task()
    mask = pairs.attention_mask.clone()
    mask[1, :3] = 0
    padded = pairs.replaced(attention_mask=mask)
    run = whole_run(pair, padded)
    before, after = run.traces.dense.logits.log_softmax(-1), written_logits(pair, run, CHOSEN).log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1)
    tokens_before = [(row, t) for row in range(6) for t in range(6) if mask[row, t]]
    expected = sum(kl[row, t].item() for row, t in tokens_before) / len(tokens_before)
    found = side_effects(pair, Prompts(pair, padded), CHOSEN, tokens(2, 6))
    assert found.kl_before_answer == pytest.approx(expected, rel=1e-6)


def test_without_other_tasks_nothing_is_said_of_them(pair, prompts):
    found = side_effects(pair, prompts, CHOSEN, tokens(2, 6))
    assert found.kl_other_tasks is None and found.solved_other_tasks is None and "solved" not in str(found)


def test_other_tasks_are_all_but_one_and_those_too_long_are_named():
    tokenizer = bridges.load_pair().tokenizer
    with pytest.warns(UserWarning, match="leave out the task 'class_init': .* max_tokens=26") as warned:
        found = other_tasks("for_while", tokenizer, max_tokens=26)
    pattern = re.compile("side effects leave out the task '(.*?)': ")
    left_out = [match[1] for one in warned if (match := pattern.match(str(one.message)))]
    assert sorted([*(one.task for one in found), *left_out, "for_while"]) == sorted(TASKS)
    assert all(one.input_ids.shape[0] == PAIRS_PER_OTHER_TASK and one.input_ids.shape[1] <= 26 for one in found)
