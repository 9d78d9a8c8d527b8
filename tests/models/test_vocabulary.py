"""One vocabulary for both models: padding and added tokens on one side are no difference, other tokens are."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from bridges.models.pairing import common_vocabulary, one_sided_tokens
from bridges.models.residual import ResidualModel

WORDS = [f"w{i}" for i in range(10)]


class Width(ResidualModel):
    """All that is asked of a model: how many tokens it has logits for."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def context(self, input_ids, attention_mask=None):
        raise NotImplementedError

    sublayer = head = read_modules = norm = hook_residuals = context


def tokenizer(words=WORDS, added=(), **special):
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=words[0], **special)
    made.add_tokens(list(added))
    return made


def common(dense, sparse, tokenizers=(None, None)):
    return common_vocabulary(Width(dense), Width(sparse), tokenizers)


def test_equal_vocabularies_are_common_to_the_last_token():
    assert common(10, 10) == 10 and common(16, 16, (tokenizer(), None)) == 16
    assert common(10, 10, (tokenizer(), tokenizer())) == 10 and one_sided_tokens((tokenizer(), tokenizer())) == {}


@pytest.mark.parametrize("sizes", [(10, 16), (16, 10)])
def test_surplus_logits_that_no_token_of_the_tokenizer_has_are_padding(sizes):
    for tokenizers in ((tokenizer(), tokenizer()), (tokenizer(), None), (None, tokenizer())):
        assert common(*sizes, tokenizers) == 10


def test_tokens_that_were_added_on_one_side_are_accepted_and_named():
    plain, padded = tokenizer(), tokenizer(pad_token="<pad>", added=["<im_end>"])
    assert sorted(padded.get_vocab().items(), key=lambda item: item[1])[-2:] == [("<pad>", 10), ("<im_end>", 11)]
    for tokenizers in ((plain, padded), (padded, plain)):
        assert common(10, 12, tokenizers) == 10 and one_sided_tokens(tokenizers) == {10: "<pad>", 11: "<im_end>"}
    assert common(16, 16, (padded, plain)) == 16
    assert one_sided_tokens((padded, None)) == one_sided_tokens((padded, padded)) == {}
    assert one_sided_tokens((tokenizer(added=["<a>", "<pad>"]), tokenizer(added=["<a>"]))) == {11: "<pad>"}


def test_different_widths_without_a_tokenizer_are_refused_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"different vocabularies, 10 and 16 tokens, and no tokenizer .* pass tokenizer="
    ):
        common(10, 16)


def test_a_model_that_lacks_ordinary_tokens_is_refused():
    words = tokenizer([*WORDS, "w10", "w11"])
    message = "dense and sparse have 12 and 10 tokens, but the tokenizer has 2 ordinary ones from 10 on, such as 'w10'"
    for tokenizers in ((words, None), (None, words), (words, words)):
        with pytest.raises(ValueError, match=message):
            common(12, 10, tokenizers)


DIFFERENT = {
    "another order": (
        tokenizer(WORDS[::-1]),
        r"10 and 10 tokens that do not agree \(0 do\): token 0 is 'w0' of dense and 'w9' of sparse",
    ),
    "two tokens swapped": (
        tokenizer([*WORDS[:8], "w9", "w8"]),
        r"10 and 10 tokens that do not agree \(8 do\): token 8 is 'w8' of dense and 'w9' of sparse",
    ),
    "a word less": (
        tokenizer(WORDS[:-1]),
        r"10 and 9 tokens that do not agree \(9 do\): token 9 is 'w9' of dense and None of sparse",
    ),
    "an added token in the place of a word": (
        tokenizer(WORDS[:-1], added=["<pad>"]),
        r"10 and 10 tokens that do not agree \(9 do\): token 9 is 'w9' of dense and '<pad>' of sparse; bridges",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_tokenizers_that_disagree_on_a_token_are_refused_with_what_they_share(case):
    other, message = DIFFERENT[case]
    with pytest.raises(ValueError, match=f"different tokenizers, {message}"):
        common(16, 16, (tokenizer(), other))
    with pytest.raises(ValueError, match="different tokenizers"):
        one_sided_tokens((other, tokenizer()))
