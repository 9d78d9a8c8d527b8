import ast

import pytest
import torch

from bridges.data import corpus
from bridges.data.corpus import bundled_corpus, bundled_documents, encode_documents, idiom_documents, pack_rows
from bridges.data.idioms import idioms
from bridges.data.tokenizer import train_tokenizer

MODULES = {"train": ["import os\n" * 200, "x = 1\n" * 300], "heldout": ["import sys\n" * 100]}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(idioms(500, seed=0), vocab_size=400)


@pytest.fixture(autouse=True)
def small_library(monkeypatch):
    monkeypatch.setattr(corpus, "python_source", MODULES.__getitem__)
    corpus._documents.cache_clear()
    yield
    corpus._documents.cache_clear()


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_documents_hold_each_module_once_and_idioms_for_three_fifths(split):
    documents = bundled_documents(split)
    generated = [text for text in documents if text not in MODULES[split]]
    assert len(documents) - len(generated) == len(MODULES[split])
    share = sum(map(len, generated)) / sum(map(len, documents))
    assert 0.5 < share < 0.7


def test_heldout_documents_are_not_among_the_training_ones():
    assert set(bundled_documents("train")).isdisjoint(bundled_documents("heldout"))


def test_the_seed_decides_order_and_idioms():
    documents = bundled_documents("heldout", seed=1)
    corpus._documents.cache_clear()
    assert bundled_documents("heldout", seed=1) == documents
    assert bundled_documents("heldout", seed=1) != bundled_documents("heldout", seed=2)


def test_documents_are_made_once_and_a_caller_may_change_the_list(monkeypatch):
    documents = bundled_documents("heldout")
    monkeypatch.setattr(corpus, "idiom_documents", None)  # making them again would fail
    documents.pop()
    assert bundled_documents("heldout")[:-1] == documents


def test_idiom_documents_have_the_asked_length_and_hold_whole_snippets():
    documents = idiom_documents(20_000, seed=5)
    assert 18_000 < sum(map(len, documents)) < 22_000
    for document in documents:
        ast.parse(document)
    statements = [len(ast.parse(document).body) for document in documents[:-1]]
    assert min(statements) >= corpus.SNIPPETS_PER_DOCUMENT


def test_rows_rebuild_the_documents(tokenizer):
    rows = bundled_corpus(tokenizer, 32, "train", seed=3)
    assert rows.dtype == torch.long and rows.shape[1] == 32
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    text = tokenizer.decode(rows[:, 1:].flatten())
    whole = "".join(document + tokenizer.eos_token for document in bundled_documents("train", seed=3))
    assert whole.startswith(text)
    assert len(tokenizer.encode(whole[len(text) :])) < 31


def test_every_document_ends_with_eos(tokenizer):
    stream = encode_documents(tokenizer, ["x = 1\n", "", "y"])
    assert tokenizer.decode(stream) == "x = 1\n<|endoftext|><|endoftext|>y<|endoftext|>"


def test_packing_by_hand():
    rows = pack_rows(torch.arange(1, 8), seq_len=4, bos_token_id=0)
    assert rows.tolist() == [[0, 1, 2, 3], [0, 4, 5, 6]]


def test_a_stream_shorter_than_a_row_gives_no_row():
    assert pack_rows(torch.arange(2), seq_len=4, bos_token_id=0).shape == (0, 4)


def test_a_seq_len_that_leaves_no_token_after_bos_is_refused():
    with pytest.raises(ValueError, match="seq_len=1"):
        pack_rows(torch.arange(4), seq_len=1, bos_token_id=0)
