"""The bundled training text as rows of tokens: generated idioms and the standard library, shuffled and packed."""

import random
from collections.abc import Iterable
from functools import lru_cache
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bridges.data.idioms import idioms
from bridges.data.python_source import python_source

# Three parts of idioms to two parts of library.
IDIOM_BYTES_PER_SOURCE_BYTE = 1.5
SNIPPETS_PER_DOCUMENT = 12
# Far from any seed a user would choose, so that held-out idioms are not drawn by a seed of training.
HELDOUT_IDIOM_SEED = 1_000_003


def bundled_corpus(
    tokenizer: PreTrainedTokenizerFast, seq_len: int, split: str = "train", seed: int = 0
) -> Int[Tensor, "n seq"]:
    """Rows of the bundled training text: [n, seq_len] token ids, the first of each row BOS.

    The documents of `bundled_documents(split, seed)`, each followed by EOS, are joined to one stream of tokens. A
    row holds BOS and the next seq_len - 1 tokens; a last row that is not full is dropped. Rows are in the order of the
    stream: shuffle them for training. Raises ValueError for an unknown split or a `seq_len` below 2.
    """
    stream = encode_documents(tokenizer, bundled_documents(split, seed))
    return pack_rows(stream, seq_len, cast(int, tokenizer.bos_token_id))


def bundled_documents(split: str = "train", seed: int = 0) -> list[str]:
    """Modules of the standard library among documents of several idioms each, in an order drawn from `seed`.

    Idioms make about 60 % of the bytes in either split; those of "heldout" come from a seed of their own.
    """
    return list(_documents(split, seed))


@lru_cache(maxsize=2)  # both splits: a few MB, which take seconds to write
def _documents(split: str, seed: int) -> tuple[str, ...]:
    modules = python_source(split)
    budget = int(IDIOM_BYTES_PER_SOURCE_BYTE * sum(map(len, modules)))
    documents = modules + idiom_documents(budget, seed + HELDOUT_IDIOM_SEED * (split == "heldout"))
    random.Random(seed).shuffle(documents)
    return tuple(documents)


def idiom_documents(n_characters: int, seed: int) -> list[str]:
    """Documents of `SNIPPETS_PER_DOCUMENT` idioms each, about `n_characters` in all."""
    sample = idioms(200, seed)
    mean_length = sum(len(snippet) + 1 for snippet in sample) / len(sample)
    snippets = idioms(round(n_characters / mean_length), seed)
    groups = (snippets[i : i + SNIPPETS_PER_DOCUMENT] for i in range(0, len(snippets), SNIPPETS_PER_DOCUMENT))
    return ["\n".join(group) + "\n" for group in groups]


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]) -> Int[Tensor, " tokens"]:
    """Encode documents to one stream of token ids, each document followed by EOS."""
    # The backend encodes a batch several times faster than the wrapper, which builds dicts and masks around it.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python
        rows = tokenizer(list(documents), add_special_tokens=False)["input_ids"]
    else:
        rows = [encoding.ids for encoding in backend.encode_batch_fast(list(documents), add_special_tokens=False)]
    stream = [token for row in rows for token in (*row, tokenizer.eos_token_id)]
    return torch.tensor(stream, dtype=torch.long)


def pack_rows(stream: Int[Tensor, " tokens"], seq_len: int, bos_token_id: int) -> Int[Tensor, "n seq"]:
    """Cut a stream of tokens into rows of BOS and seq_len - 1 tokens; tokens that do not fill a row are dropped."""
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len} must be at least 2: a row is BOS and one token or more")
    width = seq_len - 1
    text = stream[: len(stream) // width * width].view(-1, width)
    return torch.cat([text.new_full((len(text), 1), bos_token_id), text], dim=1)
