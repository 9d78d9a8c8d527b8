"""Sequences sampled from a model: what `fit` trains on when there is no data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from bridges.data.random_state import preserve_random_state
from bridges.io.progress import tracked
from bridges.models.residual import ResidualModel, input_device

BATCH_SIZE = 64


class SharedTokens(NamedTuple):
    """The tokens that both models of a pair know."""

    vocab_size: int
    """All are below this number."""
    without: frozenset[int] = frozenset()
    """Tokens below it that only one model's tokenizer has."""

    def __contains__(self, token: Any) -> bool:
        return isinstance(token, int) and 0 <= token < self.vocab_size and token not in self.without

    def ids(self) -> Int[Tensor, " tokens"]:
        """The tokens, in order."""
        return torch.tensor([token for token in range(self.vocab_size) if token not in self.without])


@torch.no_grad()
def sample_rows(
    model: nn.Module,
    n_rows: int,
    seq_len: int,
    bos_token_id: int | None,
    shared: SharedTokens | int,
    seed: int,
    progress: bool = False,
) -> Int[Tensor, "n seq"]:
    """Sequences [n_rows, seq_len] from the model at temperature 1, from BOS or, without one, from a uniform token.

    They hold `shared` tokens alone (a number: those below it), however wide the model's logits are. The same seed gives
    the same rows on the same machine; the global random state of every device is left as it was.
    """
    device = input_device(model)
    tokens = (SharedTokens(shared) if isinstance(shared, int) else shared).ids()
    generator = torch.Generator().manual_seed(seed)
    rows = []
    with _default_generation(model), preserve_random_state():
        torch.manual_seed(seed)
        starts = range(0, n_rows, BATCH_SIZE)
        for start in tracked(starts, "sampling rows from the dense model, batches", shown=progress):
            n = min(BATCH_SIZE, n_rows - start)
            first = tokens[torch.randint(len(tokens), (n, 1), generator=generator)]
            if bos_token_id is not None:
                first = torch.full((n, 1), bos_token_id)
            rows.append(_continue(model, first.to(device), seq_len, tokens.to(device)).cpu())
    return torch.cat(rows)


def sampled_text(
    dense: ResidualModel,
    n_rows: int,
    seq_len: int,
    seed: int,
    shared: SharedTokens | None = None,
    progress: bool = False,
) -> Int[Tensor, "n seq"]:
    """`sample_rows` of `shared` tokens (None: all), from the BOS of the model's configuration where that is one."""
    shared = SharedTokens(dense.vocab_size) if shared is None else shared
    bos = getattr(dense.model.config.get_text_config(), "bos_token_id", None)  # pyright: ignore
    return sample_rows(dense.model, n_rows, seq_len, bos if bos in shared else None, shared, seed, progress)


@contextmanager
def _default_generation(model: nn.Module) -> Iterator[None]:
    """Inside, `generate` ignores the model's own generation settings (repetition penalty, suppressed tokens)."""
    own = model.generation_config
    try:
        model.generation_config = GenerationConfig()  # pyright: ignore[reportArgumentType]
        yield
    finally:
        model.generation_config = own  # pyright: ignore[reportArgumentType]


class _Only(LogitsProcessor):
    """Gives no probability to other tokens than these."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore
        if len(self.tokens) == scores.shape[-1]:
            return scores
        return torch.full_like(scores, -torch.inf).index_copy(1, self.tokens, scores[:, self.tokens])


def _continue(model: nn.Module, first: Tensor, seq_len: int, tokens: Tensor) -> Tensor:
    # No end-of-sequence: rows keep one length, and what follows an EOS in training text is text again.
    return model.generate(  # pyright: ignore[reportCallIssue]
        first,
        attention_mask=torch.ones_like(first),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_beams=1,
        max_new_tokens=seq_len - 1,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([_Only(tokens)]),
    )
