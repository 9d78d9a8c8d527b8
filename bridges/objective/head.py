"""Sums of a loss over a batch's logits, which are computed and backpropagated a few tokens at a time.

The logits of a batch and their gradient are the largest tensors of a hybrid pass: with a vocabulary of 49,152, each
takes 100 times the memory of a stream of 500 channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.models.residual import Context, ResidualModel

CHUNK_LOGITS = 2**22
"""Logits that exist at a time: 16 MiB of float32, which stay near the processor."""
MIN_TOKENS = 128
"""Tokens whose logits exist at a time, at least: the product with the unembedding is slow for fewer."""
GPU_CHUNK_LOGITS = 2**27
"""As `CHUNK_LOGITS`, on a GPU, which many small products would leave idle; chosen without a measurement."""

TokenLoss = Callable[[Float[Tensor, "b kept vocab"], slice], Float[Tensor, ""]]
"""A loss summed over the tokens of some positions: of their logits, and a slice of the row that names them."""


def position_chunks(model: ResidualModel, stream: Float[Tensor, "b s d"]) -> Iterator[slice]:
    """The positions of a row in parts of `CHUNK_LOGITS` logits, or of `MIN_TOKENS` tokens if that is more.

    One position at least, so that more rows than that have more. A Hugging Face model runs its final norm on the whole
    stream for every part, which is little beside the product with the unembedding.

    All of them at once where the model would compute the logits of all of them anyway.
    """
    batch, seq = stream.shape[:2]
    tokens = max((GPU_CHUNK_LOGITS if stream.is_cuda else CHUNK_LOGITS) // model.logits_width, MIN_TOKENS)
    size = max(1, tokens // batch) if model.computes_kept_logits_alone else seq
    return (slice(start, min(start + size, seq)) for start in range(0, seq, size))


def logits_of(
    model: ResidualModel, stream: Float[Tensor, "b s d"], context: Context, positions: slice
) -> Float[Tensor, "b kept vocab"]:
    """Logits at some positions, from the stream at `final`."""
    if positions == slice(0, stream.shape[1]):
        return model.head(stream, context)
    return model.logits_at(stream, context, torch.arange(positions.start, positions.stop, device=stream.device))


def backward_from_head(
    model: ResidualModel, stream: Float[Tensor, "b s d"], context: Context, loss: TokenLoss, weight: float | Tensor
) -> Float[Tensor, ""]:
    """The loss summed over all positions, and the gradient of `weight` times it added to every leaf.

    `stream` is the stream at `final`, with its graph. The logits of one part are gone before those of the next are
    computed; the gradients of all meet at the stream, from which they are passed on once.
    """
    leaf = stream.detach().requires_grad_(stream.requires_grad)
    total = torch.zeros((), device=stream.device)
    for positions in position_chunks(model, stream):
        part = loss(logits_of(model, leaf, context, positions), positions)
        if part.requires_grad:
            _backward(torch.as_tensor(weight).to(part) * part)
        total = total + part.detach()
    if leaf.grad is not None:
        _backward(stream, leaf.grad)
    return total


def _backward(tensor: Tensor, gradient: Tensor | None = None) -> None:
    """A backward pass outside of autocast, whose rules are for forward passes."""
    with torch.autocast(tensor.device.type, enabled=False):
        tensor.backward(gradient)
