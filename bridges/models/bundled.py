"""The bundled pair: a small dense model, the sparse model trained with bridges to it, and their tokenizer."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any, NamedTuple

from transformers import AutoTokenizer, GPT2LMHeadModel

from bridges.models.sparse.model import SparseTransformer


class BundledPair(NamedTuple):
    """What `load_pair` returns."""

    dense: GPT2LMHeadModel
    sparse: SparseTransformer
    tokenizer: Any


def load_tokenizer() -> Any:
    """The bundled tokenizer: 1024 tokens of Python code."""
    with as_file(files("bridges") / "assets") as assets:
        return AutoTokenizer.from_pretrained(assets / "tokenizer")


def load_pair() -> BundledPair:
    """The bundled dense model, sparse model and tokenizer, on the CPU in evaluation mode.

    Two layers each, over 1024 tokens of Python code; trained on the standard library's source and generated idioms by
    `examples/train_dense.py`, `examples/train_sparse.py` and `examples/pretrain_sparse.py`, as `configs/bundled_pair_*`
    say. The sparse model is 2,048 wide and has two nonzero weights a row.

    >>> import torch
    >>> dense, sparse, tokenizer = load_pair()
    >>> prompt = torch.tensor([[tokenizer.bos_token_id, *tokenizer("print('hello world").input_ids]])
    >>> [tokenizer.decode(model(prompt).logits[0, -1].argmax()) for model in (dense, sparse)]
    ["')", "')"]
    """
    with as_file(files("bridges") / "assets") as assets:
        return BundledPair(
            GPT2LMHeadModel.from_pretrained(assets / "dense").eval(),
            SparseTransformer.from_pretrained(assets / "sparse").eval(),
            load_tokenizer(),
        )
