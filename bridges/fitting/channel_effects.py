"""How much the sparse model's prediction depends on each channel of its stream."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bridges.models.tokens import Batch
from bridges.objective.normalizers import counted_tokens
from bridges.objective.pair import ModelPair
from bridges.objective.sums import Reduce, no_reduce, reduce_together

EFFECT_TOKENS = 24_576
"""Tokens over which the effects are measured, for `decoder_attribution="effect"`."""
FLOOR = 1e-3
"""The least weight of a channel, in units of the mean: one on which nothing depends is penalised, not shut out."""


def decoder_freedoms(
    pair: ModelPair,
    batches: Sequence[Batch],
    reduce: Reduce = no_reduce,
    seed: int = 0,
    advance: Callable[[], Any] = lambda: None,
) -> list[Float[Tensor, " d_sparse"]]:
    """Per bridge, how freely a ridge regression may use each sparse channel: the square root of its effect, mean 1.

    A channel's effect is the root mean square of (z - mean z) times the gradient of the log-probability of a token
    drawn from the sparse model's own prediction, by a random sign for every token, so that the gradients of different
    tokens add up as in the Fisher information. What is drawn for a row depends on its tokens and the seed alone.
    `batches` are this process's part.
    """
    sparse, sites = pair.sparse, [pair.site("sparse", i) for i in range(len(pair.bridge_set))]
    device = sparse.device
    d = sparse.d_model
    n = torch.zeros((), dtype=torch.float64, device=device)
    # Of z, of (z g)^2, of z g^2 and of g^2: the mean of z is known only at the end.
    sums = [torch.zeros(4, d, dtype=torch.float64, device=device) for _ in sites]
    for ids, mask in batches:
        counted = counted_tokens(ids, mask).to(device)
        with torch.enable_grad():
            trace = sparse.trace(ids.to(device), mask if mask is None else mask.to(device), differentiable=True)
            log_p = trace.logits.to(torch.promote_types(trace.logits.dtype, torch.float32)).log_softmax(-1)
            uniform, signs = (part.to(log_p) for part in _draws(ids, seed))
            tokens = (log_p.detach().exp().cumsum(-1) < uniform[..., None]).sum(-1).clamp(max=log_p.shape[-1] - 1)
            picked = log_p.gather(-1, tokens[..., None])[..., 0]
            streams = [trace.residuals[site] for site in sites]
            gradients = torch.autograd.grad((picked * signs * counted).sum(), streams)
        n += counted.sum()
        for into, z, g in zip(sums, streams, gradients, strict=True):
            z, g = z.detach()[counted].double(), g[counted].double()
            into += torch.stack([z.sum(0), (z * g).square().sum(0), (z * g.square()).sum(0), g.square().sum(0)])
        advance()
    n, *sums = reduce_together([n, *sums], reduce)
    return [_weights(one / n.clamp(min=1)) for one in sums]


def _draws(ids: Int[Tensor, "b s"], seed: int) -> tuple[Float[Tensor, "b s"], Float[Tensor, "b s"]]:
    """Per token a number between 0 and 1 and a sign; the same for a row wherever it stands and whoever runs it."""
    uniform, signs = [], []
    for row in ids.cpu():
        digest = hashlib.blake2b(row.numpy().tobytes() + str(seed).encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        uniform.append(torch.rand(len(row), generator=generator))
        signs.append(torch.randint(2, (len(row),), generator=generator) * 2.0 - 1.0)
    return torch.stack(uniform), torch.stack(signs)


def _weights(means: Float[Tensor, "4 d"]) -> Float[Tensor, " d"]:
    mean, zg_squared, z_g_squared, g_squared = means
    effect = (zg_squared - 2 * mean * z_g_squared + mean.square() * g_squared).clamp(min=0).sqrt()
    if not effect.any():
        return torch.ones_like(effect)
    return F.normalize((effect / effect.mean()).clamp(min=FLOOR).sqrt(), p=1, dim=0) * len(effect)
