"""The bundled pair: a small dense model, the sparse one trained against it, and their tokenizer."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any, NamedTuple

from transformers import AutoTokenizer, GPT2LMHeadModel

from bridges.models.sparse.model import SparseTransformer


class Pair(NamedTuple):
    """What `load_pair` gives."""

    dense: GPT2LMHeadModel
    sparse: SparseTransformer
    tokenizer: Any


def load_pair() -> Pair:
    """The bundled dense model, sparse model and tokenizer, on the CPU in evaluation mode.

    Trained on the standard library's source and generated idioms by `examples/train_dense.py` and
    `examples/train_sparse.py`.
    """
    with as_file(files("bridges") / "assets") as assets:
        return Pair(
            GPT2LMHeadModel.from_pretrained(assets / "dense").eval(),
            SparseTransformer.from_pretrained(assets / "sparse").eval(),
            AutoTokenizer.from_pretrained(assets / "tokenizer"),
        )
