"""Tokens that a pair begins with run once for all edits: figures are those of whole rows, on tiny pairs in float64."""

import pytest
import torch
from pairs import VOCAB, tokens, toy_task
from whole import whole_run, written_p_target

from bridges.channels import batches, reference_text
from bridges.channels.attribution import predicted_effects
from bridges.channels.baselines import best_mean_difference
from bridges.channels.batches import pair_batches
from bridges.channels.curves import mean_difference_curve
from bridges.channels.prompts import Channels
from bridges.channels.reference_text import ReferenceText
from bridges.channels.runs import Prompts, p_target_under_edits, shared_tokens
from bridges.models.huggingface.adapter import HuggingFaceResidual

SITES = ("0.attn", "0.mlp", "1.attn", "1.mlp", "final")
EDITS = [Channels(site, (1, 4), at) for site in SITES for at in ("read", "residual")]


def late_cues():
    """Pairs that differ from token 3, 5 or 6 of seven on, some of them padded."""
    ids = tokens(rows=6, seed=8)
    other, starts = ids.clone(), torch.tensor([0, 1, 0, 3, 0, 4])
    for row, cue in enumerate((3, 5, 6, 5, 3, 6)):
        other[row, cue:] = (other[row, cue:] + 5) % VOCAB
    mask = (torch.arange(7) >= starts[:, None]).long()
    return toy_task().replaced(input_ids=ids, counterfactual_ids=other, attention_mask=mask)


@pytest.fixture
def whole_rows(monkeypatch):
    """The dense model is one that cannot run its rows in two parts."""
    monkeypatch.setattr(HuggingFaceResidual, "empty_prefix", lambda _: None)


def figures(pair):
    """What is measured with edits, on prompts that are made anew."""
    prompts = Prompts(pair, late_cues())
    with torch.no_grad():
        site, vectors = best_mean_difference(pair.dense, prompts)
        found = {
            "edits": p_target_under_edits(pair, prompts, EDITS),
            "edits of the sparse model": p_target_under_edits(pair, prompts, EDITS, "sparse"),
            "mean difference": vectors,
            "its curve": mean_difference_curve(pair, prompts, site, vectors, (0.5, 1.0)),
        }
    return prompts, found | {str(at): effects for at, effects in predicted_effects(pair, prompts).items()}


def test_the_tokens_that_two_prompts_begin_with_are_counted_padding_too():
    pairs = late_cues()
    pairs.counterfactual_ids[3, :3] = 1  # padding
    assert shared_tokens(pairs).tolist() == [3, 5, 6, 5, 3, 6]
    same = pairs.replaced(counterfactual_ids=pairs.input_ids)
    assert shared_tokens(same).tolist() == [6] * 6


def test_figures_are_those_of_whole_rows(pair, request):
    prompts, split = figures(pair)
    assert prompts.splits_rows and prompts.first_run(prompts.pairs) == 3
    request.getfixturevalue("whole_rows")
    prompts, whole = figures(pair)
    assert not prompts.splits_rows and prompts.first_run(prompts.pairs) == 0
    for name, values in whole.items():
        assert values.abs().max() > 0
        torch.testing.assert_close(split[name], values, rtol=1e-9, atol=1e-12, msg=name)


def test_edits_of_late_cues_are_those_written_out(pair):
    run, prompts = whole_run(pair, late_cues()), Prompts(pair, late_cues())
    with torch.no_grad():
        found = p_target_under_edits(pair, prompts, EDITS)
    for row, chosen in zip(found, EDITS, strict=True):
        assert torch.allclose(row, written_p_target(pair, run, chosen), rtol=1e-10), chosen


def test_a_run_holds_the_tokens_from_the_first_that_differs(pair, monkeypatch):
    monkeypatch.setattr(batches, "MAX_TOKENS", 14)  # two pairs
    prompts, whole = Prompts(pair, late_cues()), whole_run(pair, late_cues())
    firsts = []
    with torch.no_grad():
        for run in prompts.runs([1, 2]):
            width = run.dz[2].shape[1]
            firsts.append(7 - width)
            assert torch.allclose(run.dz[2], whole.dz[2][run.rows, -width:], rtol=1e-10, atol=1e-13)
            counted = run.pairs.attention_mask[:, -width:].bool()
            stream = whole.traces.dense.residuals[2][run.rows, -width:]
            assert torch.allclose(run.dense.residuals[2][counted], stream[counted], rtol=1e-10, atol=1e-13)
    assert firsts == [6, 5, 3]


def test_only_the_tokens_from_the_first_that_differs_run_for_an_edit(pair):
    prompts, widths = Prompts(pair, late_cues()), []
    with torch.no_grad():
        list(prompts.runs([2]))
        mlp = pair.dense.model.transformer.h[1].mlp
        handle = mlp.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
        p_target_under_edits(pair, prompts, [Channels("1.attn", (0,), "residual")])
        handle.remove()
    assert widths == [4]


def test_pairs_that_are_alike_from_their_cue_on_come_together():
    pairs = late_cues()
    split = pair_batches(pairs, 1, VOCAB, shared_tokens(pairs))
    assert [rows.tolist() for rows, _ in split] == [[5, 2, 3, 1, 0, 4]]


@pytest.mark.parametrize("per_shared_token", [0, 25])
def test_shared_tokens_count_in_a_batchs_bytes(monkeypatch, per_shared_token):
    monkeypatch.setattr(batches, "STREAM_BYTES", 420)
    pairs = late_cues()
    split = pair_batches(pairs, 100, VOCAB, shared_tokens(pairs), per_shared_token)
    assert sorted(row for rows, _ in split for row in rows.tolist()) == list(range(6)) and len(split) > 1
    for rows, one in split:
        n, width = one.input_ids.shape
        kept = int((7 - shared_tokens(pairs)[rows]).max())
        assert n == 1 or n * (kept * 100 + (width - kept) * per_shared_token) <= 420
    assert len(split) == (4 if per_shared_token == 0 else 6)


def test_text_is_run_for_one_site_at_a_time_and_kept_while_it_is_small(pair, monkeypatch):
    text, kept = tokens(3, 8, seed=9), {1: [0, 3], 2: [0, 3, 5], 4: [2]}
    chosen = [Channels(SITES[i], tuple(kept[i]), "residual") for i in (1, 2, 4)]
    runs, ran = reference_text.ablation_run, []
    monkeypatch.setattr(reference_text, "ablation_run", lambda *args: ran.append(list(args[-1])) or runs(*args))
    reference = ReferenceText(pair, text, kept)
    monkeypatch.setattr(reference_text, "KEPT_BYTES", 2 * reference._bytes())
    with torch.no_grad():
        first, again = ([reference.ablation_kl(one) for one in chosen] for _ in range(2))
    assert ran == [[1], [2], [4], [4]] and first == again and min(first) > 0
