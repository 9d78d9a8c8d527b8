"""The bundled pair: what the package ships."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch

from bridges.models.bundled import load_pair


@pytest.fixture(scope="module")
def pair():
    return load_pair()


def test_the_sparse_model_has_two_weights_a_row(pair):
    """As many as README and the circuit of a few nodes say."""
    for name, weight in pair.sparse.named_parameters():
        if weight.ndim == 2 and "wpe" not in name:
            assert weight.count_nonzero() <= weight.numel() / 1024 + 1, name
            assert pair.sparse.config.d_model == 2048


def test_the_package_carries_less_than_15_megabytes():
    assets = Path(str(files("bridges") / "assets"))
    assert sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) < 15e6


def test_both_models_and_the_tokenizer_share_a_vocabulary_and_are_ready_to_run(pair):
    sizes = {len(pair.tokenizer), pair.dense.config.vocab_size, pair.sparse.config.vocab_size}
    assert sizes == {1024} and not (pair.dense.training or pair.sparse.training)


def test_both_models_close_quotes(pair):
    for text, answer in (("print('hello world", "')"), ('print("hello world', '")')):
        ids = torch.tensor([[0, *pair.tokenizer(text).input_ids]])
        for model in (pair.dense, pair.sparse):
            assert pair.tokenizer.decode(model(ids).logits[0, -1].argmax()) == answer
