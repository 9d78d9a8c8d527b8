from pathlib import Path

import pytest
from transformers import AutoTokenizer

import bridges
from bridges.data.idioms import idioms
from bridges.data.python_source import python_source
from bridges.data.tokenizer import END_OF_TEXT, train_tokenizer

ANSWERS = [
    "('",
    '("',
    "')",
    '")',
    "]",
    "]]",
    "):",
    "=",
    ":",
    ",",
    "(",
    ".",
    "add",
    "None",
    " as",
    " in",
    " else",
    " +=",
]
ANSWERS += [" {", " =", " ==", " enumerate", " range", "\n", "\n    ", "\n        "]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(idioms(4000, seed=0) + python_source("heldout"), vocab_size=700)


def pieces(tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


def test_it_has_the_requested_size_and_one_special_token(tokenizer):
    assert len(tokenizer) == 700
    assert tokenizer.all_special_tokens == [END_OF_TEXT]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0


@pytest.mark.parametrize("text", ["('", '("', "')", '")', "]", "):", "()", "\n", "\n    ", "\n        ", " =", " =="])
def test_cues_and_answers_are_single_tokens(tokenizer, text):
    assert pieces(tokenizer, text) == [text]


def test_the_bundled_tokenizer_has_the_answers_of_all_tasks_as_single_tokens():
    bundled = AutoTokenizer.from_pretrained(Path(bridges.__file__).parent / "assets" / "tokenizer")
    assert len(bundled) == 1024
    for text in ANSWERS:
        assert pieces(bundled, text) == [text]


@pytest.mark.parametrize("before", ["print", "x = foo(bar, f", "((", "a.b"])
@pytest.mark.parametrize("after", ["", ")", ",", "):", ".x", "\n", "\n    return", "x", "'"])
@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_at_brackets_never_merge_with_what_surrounds_them(tokenizer, before, after, quote):
    tokens = pieces(tokenizer, f"{before}({quote}bad value{quote}){after}")
    assert tokens.count(f"({quote}") == 1
    assert tokens.count(f"{quote})") == 1


def test_every_digit_is_a_token(tokenizer):
    assert pieces(tokenizer, "1234 56") == ["1", "2", "3", "4", " 5", "6"]


def test_a_line_break_takes_the_whole_indentation(tokenizer):
    assert pieces(tokenizer, ":\n        return x\n    if") == [":", "\n        ", "return", " x", "\n    ", "if"]


@pytest.mark.parametrize(
    "text", ["tab\t\tx \r\n  y  \n\n\n", "naïve “ü” 漢字 🐍", "a  =   1   # two", "('')(\"\")' )", "", " "]
)
def test_any_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_source_comes_back_unchanged(tokenizer):
    for text in python_source("heldout"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_it_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "\n".join(idioms(50, seed=1))
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.pad_token_id == 0


def test_training_twice_gives_the_same_tokenizer():
    texts = idioms(300, seed=0)
    first, second = (train_tokenizer(texts, 300).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size=256"):
        train_tokenizer(["x"], 256)
