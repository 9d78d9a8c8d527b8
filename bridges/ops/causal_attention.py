"""Causal attention with an attention sink, without its matrix of weights: torch's fused kernel, rescaled.

The sink is a key slot of logit s whose value is zero. With Z the sum of exp(score) over a query's real keys, attention
with the sink is attention without it times Z / (Z + exp s) = sigmoid(log Z - s). The fused kernel gives log Z. Its
backward pass computes weights as exp(score - log Z); given the output with the sink, and log(Z + exp s) for log Z, it
computes the gradients of attention with the sink.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_FUSED = "_scaled_dot_product_flash_attention_for_cpu"


def has_fused_attention(q: Tensor, k: Tensor) -> bool:
    """Whether `causal_attention` runs on these: float32 or float64 on the CPU, as many queries as keys."""
    plain = q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()
    return plain and q.shape[-2] == k.shape[-2] and q.numel() > 0 and hasattr(torch.ops.aten, _FUSED)


def causal_attention(
    q: Float[Tensor, "b n_head s d_head"],
    k: Float[Tensor, "b n_head s d_head"],
    v: Float[Tensor, "b n_head s d_head"],
    sink_logit: Float[Tensor, " n_head"] | None = None,
) -> Float[Tensor, "b n_head s d_head"]:
    """Every query's mean of the values of its own and earlier keys, with weights softmax(q k / sqrt(d_head)).

    `sink_logit`: of each head, the logit of a further key whose value is zero. Requires `has_fused_attention`.

    >>> q, k, v = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0)).unbind()
    >>> even = causal_attention(q, k, v, torch.zeros(2))
    >>> torch.allclose(even, causal_attention_eager(q, k, v, torch.zeros(2)), atol=1e-6)
    True
    """
    sink = q.new_full((q.shape[1],), -torch.inf) if sink_logit is None else sink_logit.to(q.dtype)
    return _SinkAttention.apply(q, k, v, sink)  # pyright: ignore[reportReturnType]


def causal_attention_eager(
    q: Float[Tensor, "b n_head s d_head"],
    k: Float[Tensor, "b n_head s d_head"],
    v: Float[Tensor, "b n_head s d_head"],
    sink_logit: Float[Tensor, " n_head"] | None = None,
) -> Float[Tensor, "b n_head s d_head"]:
    """`causal_attention` by its definition: the reference implementation, used in tests."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(later, -torch.inf)
    if sink_logit is None:
        return scores.softmax(-1) @ v
    slot = sink_logit.to(q.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([slot, scores], dim=-1).softmax(-1)[..., 1:] @ v


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_logit: Tensor) -> Tensor:
        # The kernel reads each vector as one piece of memory, whatever its strides.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        mean, log_z = getattr(torch.ops.aten, _FUSED)(q, k, v, 0.0, True)
        slot = sink_logit[:, None].to(log_z.dtype)
        share = torch.sigmoid(log_z - slot)
        out = mean * share[..., None].to(mean.dtype)
        ctx.save_for_backward(q, k, v, sink_logit, out, torch.logaddexp(log_z, slot), share)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink_logit, out, log_total, share = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again, which the kernel's own cannot be
            wanted = [x for x, wants in zip((q, k, v, sink_logit), ctx.needs_input_grad, strict=True) if wants]
            again = causal_attention_eager(q, k, v, sink_logit)
            found = iter(torch.autograd.grad(again, wanted, grads[0], create_graph=True))
            return tuple(next(found) if wants else None for wants in ctx.needs_input_grad)
        fused = getattr(torch.ops.aten, _FUSED + "_backward")
        q_grad, k_grad, v_grad = fused(grads[0], q, k, v, out, log_total, 0.0, True)
        # d out / d sink_logit = -out (1 - share), as the sink's own share of the softmax is 1 - share.
        sink_grad = -((grads[0] * out).sum(-1) * (1 - share)).sum((0, 2))
        return q_grad, k_grad, v_grad, sink_grad.to(q.dtype)
