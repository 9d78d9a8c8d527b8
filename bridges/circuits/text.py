"""The text that node means are taken over."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor

from bridges.config import DEFAULT_SEQ_LEN
from bridges.data.corpus import bundled_documents, encode_documents, pack_rows
from bridges.data.prepare import default_seq_len
from bridges.data.sampled import SharedTokens, sampled_text
from bridges.models.bundled import load_tokenizer
from bridges.models.loading import as_residual
from bridges.models.sparse.model import SparseTransformer
from bridges.models.tokens import Batch

ROWS = 32
"""Rows of a forward pass."""
DOCUMENTS = 400
"""Documents of the bundled corpus that rows are taken from."""


def mean_text(
    model: SparseTransformer, text: Int[Tensor, "rows seq"] | None, tokenizer: Any, n_tokens: int, seed: int
) -> list[Batch]:
    """Batches of the given text, of the bundled corpus where the tokenizer is its own, or sampled from the model."""
    width = min(default_seq_len(model.config.block_size), DEFAULT_SEQ_LEN)
    if text is None and is_bundled(tokenizer):
        documents = bundled_documents("heldout", seed)[:DOCUMENTS]  # a twentieth of the text, made in no time
        text = pack_rows(encode_documents(tokenizer, documents), width, tokenizer.bos_token_id)
    elif text is None:
        rows = -(-n_tokens // width)
        text = sampled_text(as_residual(model), rows, width, seed, SharedTokens(model.config.vocab_size))
    rows = max(1, n_tokens // text.shape[1])
    return [(ids, None) for ids in text[:rows].split(ROWS)]


def is_bundled(tokenizer: Any) -> bool:
    """Whether it has the vocabulary of the bundled tokenizer."""
    return tokenizer is not None and tokenizer.get_vocab() == load_tokenizer().get_vocab()
