"""Sequences sampled from a model: what `fit` trains on when there is no data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GenerationConfig

from bridges.data.random_state import preserve_random_state
from bridges.models.residual import ResidualModel, input_device

BATCH_SIZE = 64


@torch.no_grad()
def sample_rows(
    model: nn.Module, n_rows: int, seq_len: int, bos_token_id: int | None, vocab_size: int, seed: int
) -> Int[Tensor, "n seq"]:
    """Sequences [n_rows, seq_len] from the model at temperature 1, from BOS or, without one, from a uniform token.

    The same seed gives the same rows on the same machine; the global random state of every device is left as it was.
    """
    device = input_device(model)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    with _default_generation(model), preserve_random_state():
        torch.manual_seed(seed)
        for start in range(0, n_rows, BATCH_SIZE):
            n = min(BATCH_SIZE, n_rows - start)
            first = torch.randint(vocab_size, (n, 1), generator=generator)
            if bos_token_id is not None:
                first = torch.full((n, 1), bos_token_id)
            rows.append(_continue(model, first.to(device), seq_len).cpu())
    return torch.cat(rows)


def sampled_text(dense: ResidualModel, n_rows: int, seq_len: int, seed: int) -> Int[Tensor, "n seq"]:
    """`sample_rows` with the BOS of the model's configuration, where that is one of its tokens."""
    bos = getattr(dense.model.config.get_text_config(), "bos_token_id", None)  # pyright: ignore
    bos = bos if isinstance(bos, int) and 0 <= bos < dense.vocab_size else None
    return sample_rows(dense.model, n_rows, seq_len, bos, dense.vocab_size, seed)


@contextmanager
def _default_generation(model: nn.Module) -> Iterator[None]:
    """Inside, `generate` ignores the model's own generation settings (repetition penalty, suppressed tokens)."""
    own = model.generation_config
    try:
        model.generation_config = GenerationConfig()  # pyright: ignore[reportArgumentType]
        yield
    finally:
        model.generation_config = own  # pyright: ignore[reportArgumentType]


def _continue(model: nn.Module, first: Tensor, seq_len: int) -> Tensor:
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
    )
