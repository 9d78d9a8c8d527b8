import pytest
import torch
from transformers import AutoTokenizer

from bridges.circuits.tasks import single_double_quote


@pytest.fixture(scope="module")
def tokenizer():
    from importlib.resources import files

    return AutoTokenizer.from_pretrained(str(files("bridges") / "assets" / "tokenizer"))


def test_three_examples_read_as_a_person_would(tokenizer):
    pairs = single_double_quote(tokenizer, 6, seed=3)
    for i in range(3):
        real = pairs.attention_mask[i].bool()
        shown, other = (tokenizer.decode(ids[i][real][1:]) for ids in (pairs.input_ids, pairs.counterfactual_ids))
        quote, swapped = ("'", '"') if i % 2 == 0 else ('"', "'")
        assert f"({quote}" in shown and swapped not in shown
        assert other == shown.replace(quote, swapped)
        assert tokenizer.decode(pairs.answers[i]) == f"{quote})"
        assert tokenizer.decode(pairs.targets[i]) == f"{swapped})"


def test_pairs_differ_in_one_token_and_both_ways_occur_equally(tokenizer):
    pairs = single_double_quote(tokenizer, 20, seed=0)
    assert ((pairs.input_ids != pairs.counterfactual_ids).sum(1) == 1).all()
    assert (pairs.answers != pairs.targets).all()
    assert sorted(pairs.targets.unique(return_counts=True)[1].tolist()) == [10, 10]
    assert (pairs.input_ids[pairs.attention_mask == 0] == 0).all()
    first_real = pairs.attention_mask.argmax(1)
    assert (pairs.input_ids.gather(1, first_real[:, None]) == tokenizer.bos_token_id).all()


def test_the_seed_decides_the_prompts(tokenizer):
    same = [single_double_quote(tokenizer, 8, seed=1) for _ in range(2)]
    assert torch.equal(same[0].input_ids, same[1].input_ids)
    other = single_double_quote(tokenizer, 8, seed=2)
    assert other.input_ids.shape != same[0].input_ids.shape or not torch.equal(other.input_ids, same[0].input_ids)


def test_a_tokenizer_that_splits_the_answer_is_refused_with_the_rule(tokenizer):
    class Splitting:
        bos_token_id = 0

        def encode(self, text, add_special_tokens):
            return [ord(c) for c in text]

    with pytest.raises(ValueError, match=r"splits \"'\)\" into 2 tokens"):
        single_double_quote(Splitting(), 2)
