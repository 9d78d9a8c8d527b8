"""The layers of a weight-sparse transformer, in the order of operations of method.md, section 8.

Read: the sublayer's input, after the norm.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import Cache

from bridges.models.sparse.config import SparseConfig
from bridges.ops.abs_topk import abs_topk
from bridges.ops.causal_attention import causal_attention, has_fused_attention


class AbsTopK(nn.Module):
    """Keeps the k entries of largest magnitude and zeroes the others, or keeps everything when k is None.

    A module even where it keeps everything, so that each of the ten locations can have a hook.
    """

    def __init__(self, k: int | None):
        super().__init__()
        self.k = k

    def forward(self, x: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
        """Over the last dimension."""
        return x if self.k is None or self.k >= x.shape[-1] else abs_topk(x, self.k)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"k={self.k}"


class RMSNorm(nn.Module):
    """x / rms(x) * weight; eps is float32's machine epsilon, float64's for float64 input."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows size"]:
        """Over the last dimension."""
        eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        return F.rms_norm(x, self.weight.shape, self.weight, eps)


class Sink(nn.Module):
    """The attention sink: one learned logit per head, for a key slot whose value is zero."""

    def __init__(self, n_head: int):
        super().__init__()
        self.sink_logit = nn.Parameter(torch.zeros(n_head))


class OutputProjection(nn.Linear):
    """A matrix that writes to the stream; its initial scale falls with the number of layers (GPT-2)."""


class Attention(nn.Module):
    """Causal attention on the norm's output; q, k and v are stacked in `c_attn`."""

    def __init__(self, config: SparseConfig, layer: int):
        super().__init__()
        assert config.n_head and config.d_head
        self.layer, self.n_head, self.d_head, self.dropout = layer, config.n_head, config.d_head, config.dropout
        heads = config.n_head * config.d_head
        self.c_attn = nn.Linear(config.d_read, 3 * heads, bias=config.bias)
        self.c_proj = OutputProjection(heads, config.d_model, bias=config.bias)
        self.attn_imp = Sink(config.n_head) if config.sink else None
        self.attn_in, self.attn_out = AbsTopK(config.kept("attn_in")), AbsTopK(config.kept("attn_out"))
        self.attn_q, self.attn_k, self.attn_v = (AbsTopK(config.kept(f"attn_{name}")) for name in "qkv")

    def forward(
        self, x: Float[Tensor, "b s d_read"], allowed: Bool[Tensor, "#b 1 s t"], cache: Cache | None = None
    ) -> Float[Tensor, "b s d_model"]:
        """What is added to the stream; keys and values are appended to those of `cache`, t in all."""
        q, k, v = self.c_attn(self.attn_in(x)).chunk(3, dim=-1)
        q, k, v = (self.split_heads(part) for part in (self.attn_q(q), self.attn_k(k), self.attn_v(v)))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        mixed = self._attend(q, k, v, allowed).transpose(1, 2).flatten(2)
        return self.attn_out(F.dropout(self.c_proj(mixed), self.dropout, self.training))

    def split_heads(self, x: Float[Tensor, "b s heads"]) -> Float[Tensor, "b n_head s d_head"]:
        """Queries, keys or values of all heads side by side, head by head."""
        return rearrange(x, "b s (n_head d_head) -> b n_head s d_head", n_head=self.n_head)

    def _attend(
        self,
        q: Float[Tensor, "b n_head s d_head"],
        k: Float[Tensor, "b n_head t d_head"],
        v: Float[Tensor, "b n_head t d_head"],
        allowed: Bool[Tensor, "#b 1 s t"],
    ) -> Float[Tensor, "b n_head s d_head"]:
        dropped = self.training and self.dropout > 0
        if has_fused_attention(q, k) and not dropped and _is_causal(allowed):
            return causal_attention(q, k, v, None if self.attn_imp is None else self.attn_imp.sink_logit)
        return F.dropout(self.weights(q, k, allowed), self.dropout, self.training) @ v

    def weights(
        self,
        q: Float[Tensor, "b n_head s d_head"],
        k: Float[Tensor, "b n_head t d_head"],
        allowed: Bool[Tensor, "#b 1 s t"],
    ) -> Float[Tensor, "b n_head s t"]:
        """How much of each key's value a query takes; what is missing to 1 goes to the attention sink."""
        scores = (q @ k.mT) * (1 / math.sqrt(self.d_head))
        # Not -inf: a padding token that may attend to no key must stay finite, its gradient too.
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        if self.attn_imp is None:
            return scores.softmax(-1)
        slot = self.attn_imp.sink_logit.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([slot, scores], dim=-1).softmax(-1)[..., 1:]


class MLP(nn.Module):
    """Two matrices, with AbsTopK after the activation."""

    def __init__(self, config: SparseConfig):
        super().__init__()
        assert config.d_mlp
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.d_read, config.d_mlp, bias=config.bias)
        self.act = nn.ReLU() if config.activation_type == "relu" else nn.GELU()
        self.c_proj = OutputProjection(config.d_mlp, config.d_model, bias=config.bias)
        self.mlp_in, self.mlp_out = AbsTopK(config.kept("mlp_in")), AbsTopK(config.kept("mlp_out"))
        self.mlp_neuron = AbsTopK(config.kept("mlp_neuron"))

    def forward(self, x: Float[Tensor, "b s d_read"]) -> Float[Tensor, "b s d_model"]:
        """What is added to the stream."""
        neurons = self.mlp_neuron(self.act(self.c_fc(self.mlp_in(x))))
        return self.mlp_out(F.dropout(self.c_proj(neurons), self.dropout, self.training))


class Block(nn.Module):
    """Two sublayers, each from the stream to the stream; positions, where concatenated, have their own norms."""

    def __init__(self, config: SparseConfig, layer: int):
        super().__init__()
        self.ln_1 = build_norm(config, config.d_model)
        self.attn = Attention(config, layer)
        self.ln_2 = build_norm(config, config.d_model)
        self.mlp = MLP(config)
        if config.d_pos_emb is not None:
            self.ln_p1 = build_norm(config, config.d_pos_emb)
            self.ln_p2 = build_norm(config, config.d_pos_emb)
        self.rectified = config.residual_activation_type == "relu"
        self.resid_post_attn = AbsTopK(config.kept("resid_post_attn"))
        self.resid_post_mlp = AbsTopK(config.kept("resid_post_mlp"))

    def attention(
        self,
        residual: Float[Tensor, "b s d_model"],
        positions: Float[Tensor, "b s d_pos"] | None,
        allowed: Bool[Tensor, "#b 1 s t"],
        cache: Cache | None = None,
    ) -> Float[Tensor, "b s d_model"]:
        """The attention sublayer, from the stream at `N.attn` to the stream at `N.mlp`.

        `positions` are the position channels to concatenate, None where the model adds them to the embedding;
        `allowed` says which of the t keys (those of `cache` included) each query may attend to.
        """
        read = self.ln_1(residual)
        if positions is not None:
            read = torch.cat([read, self.ln_p1(positions)], dim=-1)
        return self.resid_post_attn(self._rectify(residual + self.attn(read, allowed, cache)))

    def feed_forward(
        self, residual: Float[Tensor, "b s d_model"], positions: Float[Tensor, "b s d_pos"] | None
    ) -> Float[Tensor, "b s d_model"]:
        """The MLP sublayer, from the stream at `N.mlp` to the stream at the next layer's first site."""
        read = self.ln_2(residual)
        if positions is not None:
            read = torch.cat([read, self.ln_p2(positions)], dim=-1)
        return self.resid_post_mlp(self._rectify(residual + self.mlp(read)))

    def _rectify(self, residual: Float[Tensor, "b s d_model"]) -> Float[Tensor, "b s d_model"]:
        return residual.relu() if self.rectified else residual


class Trunk(nn.Module):
    """Embeddings, blocks and the final norm: everything before the unembedding."""

    def __init__(self, config: SparseConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.block_size, config.d_pos_emb or config.d_model)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = build_norm(config, config.d_model)


def build_norm(config: SparseConfig, size: int) -> RMSNorm | nn.LayerNorm:
    """The model's kind of norm, for `size` channels."""
    return RMSNorm(size) if config.rms_norm else nn.LayerNorm(size, eps=1e-5, bias=config.ln_bias)


def attention_pattern(
    seq: int, past: int, attention_mask: Tensor | None, device: torch.device
) -> Bool[Tensor, "#b 1 seq total"]:
    """Which of the past + seq keys each of the last seq queries may attend to: itself and earlier ones, no padding."""
    total = past + seq
    allowed = torch.ones(seq, total, dtype=torch.bool, device=device).tril(past)[None, None]
    return allowed if attention_mask is None else allowed & attention_mask[:, None, None, :].bool()


def _is_causal(allowed: Bool[Tensor, "#b 1 s t"]) -> bool:
    """Whether every query may attend to all keys up to its own, and to no other."""
    return allowed.shape[0] == 1 and torch.equal(allowed[0, 0], torch.ones_like(allowed[0, 0]).tril())


def sinusoids(block_size: int, width: int) -> Float[Tensor, "block_size width"]:
    """Sines (even channels) and cosines (odd channels) of position / 10000^(2j / width) (Vaswani et al. 2017, 3.5)."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(block_size, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width].float()
