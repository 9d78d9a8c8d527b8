"""The dense side has a padding token that the sparse side lacks: it is taken under the mask, and there alone."""

import pytest
import torch
from pairs import VOCAB, gpt2, join, relative, sparse_model, tokens, toy_task, with_units

import bridges
from bridges.channels import reference_text
from bridges.channels.reference_text import sample_text
from bridges.channels.runs import Prompts

PAD = VOCAB
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1], [1] * 7])


@pytest.fixture(scope="module")
def wide():
    """A pair whose dense model has one token more, which pads rows."""
    return with_units(join(gpt2(vocab=VOCAB + 1), sparse_model()))


def padded(fill):
    return tokens().masked_fill(MASK == 0, fill)


def test_losses_are_those_of_rows_with_any_other_padding(wide):
    one, other = (bridges.hybrid_losses(*wide[:2], wide.bridge_set, padded(fill), MASK) for fill in (PAD, 0))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    figures = [bridges.evaluate(*wide, {"input_ids": padded(fill), "attention_mask": MASK}) for fill in (PAD, 0)]
    assert figures[0].mean == figures[1].mean
    with pytest.raises(
        ValueError, match=r"input_ids holds token 17; valid ids are 0 to 16 \(the models have 17 and 18"
    ):
        bridges.hybrid_losses(*wide[:2], wide.bridge_set, padded(PAD))


def test_steered_logits_are_those_of_rows_with_any_other_padding(wide):
    edit = bridges.Edit("1.attn", 3, 0.7)
    with bridges.steer(wide.dense.model, wide.bridge_set, edit, sparse=wide.sparse) as dense, torch.no_grad():
        one, other = (dense(padded(fill), attention_mask=MASK).logits[:, -1] for fill in (PAD, 0))
        assert torch.equal(one, other)
        options = {"attention_mask": MASK, "max_new_tokens": 3, "do_sample": False, "suppress_tokens": [PAD]}
        grown = [dense.generate(padded(fill), pad_token_id=0, **options)[:, 7:] for fill in (PAD, 0)]
        assert torch.equal(*grown)
        message = (
            r"input_ids holds token 17, but the sparse model has tokens 0 to 16; where it fills rows that have ended"
        )
        with pytest.raises(ValueError, match=message):
            dense(padded(PAD))
    assert relative(one, wide.dense.model(padded(0), attention_mask=MASK).logits[:, -1]) > 1e-3


def test_prompts_and_counterfactuals_are_those_of_rows_with_any_other_padding(wide):
    mask = torch.cat([MASK, MASK[:2]])
    runs = []
    for fill in (PAD, 0):
        task = toy_task()
        ids, other = (one.masked_fill(mask == 0, fill) for one in (task.input_ids, task.counterfactual_ids))
        pairs = task.replaced(input_ids=ids, counterfactual_ids=other, attention_mask=mask)
        runs.append(Prompts(wide, pairs))
        edit = bridges.counterfactual(wide.sparse, "1.attn", 3, ids, other, mask)
        runs.append(edit.value)
    assert torch.equal(runs[1], runs[3]) and torch.equal(runs[0].pairs.input_ids, runs[2].pairs.input_ids)


def test_sampled_text_holds_the_tokens_and_the_width_that_both_models_have():
    pair = join(gpt2(vocab=VOCAB + 1, context=12), sparse_model(block_size=10))
    text = sample_text(pair, seed=0)
    assert text.shape[1] == 10 and text.max() < VOCAB


class Words:
    """A tokenizer of the models' tokens, of which the last is an added one."""

    def __init__(self, added):
        self.words = {f"w{i}": i for i in range(VOCAB - 1)}
        self.added_tokens_decoder = dict.fromkeys([VOCAB - 1], "<mark>") if added else {}

    def get_vocab(self):
        return self.words | {word: i for i, word in self.added_tokens_decoder.items()}


def test_sampled_text_holds_no_token_that_only_one_tokenizer_has(monkeypatch):
    pair = join(gpt2(), sparse_model())
    seen = []
    monkeypatch.setattr(
        reference_text,
        "saved_tokenizers",
        lambda sources: seen.append(sources) or (Words(added=True), Words(added=False)),
    )
    assert (sample_text(pair, seed=0) == VOCAB - 1).any()
    text = sample_text(pair, seed=0, sources=("dense", "sparse"))
    assert not (text == VOCAB - 1).any() and text.max() == VOCAB - 2
    models = with_units(pair).dense.model, pair.sparse.model
    bridges.find_channels(*models, pair.bridge_set, toy_task(), budget=1e9, candidates=8, progress=False)
    task = toy_task(rows=70)
    bridges.sweep(*models, pair.bridge_set, task, bridges.Channels("0.mlp", (1,), "read"), (1.0,), progress=False)
    assert seen == [("dense", "sparse"), models, models]
