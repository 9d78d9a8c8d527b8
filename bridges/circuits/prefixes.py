"""A forward pass to the last tokens' logits that computes every prefix once, and of the last layer what they need.

A causal model's values at a token depend on the tokens up to it alone. So prompts that begin alike share rows, padding
has none, and what the first layer reads depends on the token and its position. In the last layer the last token of a
prompt alone has a q, neurons and writes, since nothing reads the others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.models.attention_mask import position_ids
from bridges.models.sparse.blocks import Block, attention_pattern
from bridges.models.sparse.model import SparseTransformer


class Prefixes(NamedTuple):
    """The prefixes of some prompts, by number: tokens after the same tokens have the same one.

    >>> ids = torch.tensor([[7, 5, 6], [0, 5, 6]])
    >>> Prefixes.of(ids, torch.tensor([[1, 1, 1], [0, 1, 1]])).numbers
    tensor([[ 0,  1,  2],
            [-1,  3,  4]])
    """

    input_ids: Int[Tensor, "n seq"]
    positions: Int[Tensor, "n seq"]
    numbers: Int[Tensor, "n seq"]
    """Of the prefix that ends at each token; -1 at padding."""

    @classmethod
    def of(cls, input_ids: Int[Tensor, "n seq"], attention_mask: Int[Tensor, "n seq"]) -> Prefixes:
        """Of left-padded prompts."""
        known: dict[tuple[int, int], int] = {}  # by the number of the prefix before, and the token
        numbers = torch.full(input_ids.shape, -1)
        starts = (input_ids.shape[1] - attention_mask.sum(1)).tolist()
        for row, (tokens, start) in enumerate(zip(input_ids.tolist(), starts, strict=True)):
            number = -1
            for column in range(start, len(tokens)):
                number = known.setdefault((number, tokens[column]), len(known))
                numbers[row, column] = number
        return cls(input_ids, position_ids(attention_mask), numbers.to(input_ids.device))

    def take(self, rows: Int[Tensor, " rows"]) -> Prefixes:
        """Those of some of the prompts, without the columns where all of these have padding."""
        numbers = self.numbers[rows]
        real = (numbers >= 0).any(0)
        return Prefixes(self.input_ids[rows][:, real], self.positions[rows][:, real], numbers[:, real])


class Layout(NamedTuple):
    """Which rows a pass has, and who reads which; `rows` are of the first site: distinct tokens at their positions."""

    tokens: Int[Tensor, " rows"]
    positions: Int[Tensor, " rows"]
    row_of: Int[Tensor, " prefixes"]
    """The row of each prefix's last token."""
    prefix_of: Int[Tensor, "n seq"]
    """The prefix that ends at each token; any at padding."""
    met: Int[Tensor, " prefixes"]
    """Where each prefix is met, into the flattened prompts."""
    allowed: Bool[Tensor, "n 1 seq seq"]
    """Which keys each query may attend to."""

    @classmethod
    def of(cls, prefixes: Prefixes, with_positions: bool) -> Layout:
        """Of a pass over these; `with_positions` says whether equal tokens at two positions have rows of their own."""
        numbers, seq = prefixes.numbers, prefixes.numbers.shape[1]
        real = (numbers >= 0).flatten().nonzero().squeeze(1)
        known, of_real = numbers.flatten()[real].unique(return_inverse=True)
        met = torch.empty_like(known).scatter_(0, of_real, real)
        prefix_of = numbers.new_zeros(numbers.numel()).scatter_(0, real, of_real).view_as(numbers)
        # One number for a token at a position, since `unique` is much faster over numbers than over pairs.
        ends = (prefixes.input_ids * seq + prefixes.positions * with_positions).flatten()[met]
        distinct, row_of = ends.unique(return_inverse=True)
        tokens, positions = distinct // seq, distinct % seq
        allowed = attention_pattern(seq, 0, numbers >= 0, numbers.device)
        return cls(tokens, positions, row_of, prefix_of, met, allowed)


def embeds_positions(model: SparseTransformer) -> bool:
    """Whether what the first layer reads differs from position to position."""
    return model.config.d_pos_emb is not None or bool(model.transformer.wpe.weight.any())


def last_logits(model: SparseTransformer, prefixes: Prefixes) -> Float[Tensor, "n vocab"]:
    """The logits after the last token of every prompt, up to rounding those of the model's own pass.

    The values of a place are [1, rows, d] inside. `replaced_nodes` may replace them by what treats every row alike; a
    gradient with respect to what rows share is that of the plain pass, since it is a sum over them.

    Args:
        model: in evaluation mode, since nothing is dropped out.
        prefixes: of the prompts.

    >>> import bridges
    >>> model, ids = bridges.load_pair().sparse, torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    >>> found = last_logits(model, Prefixes.of(ids, torch.ones_like(ids)))
    >>> bool((found - model(ids).logits[:, -1]).abs().max() < 1e-4)
    True
    """
    layout = Layout.of(prefixes, embeds_positions(model))
    tokens, at = layout.tokens[None], layout.positions[None]
    residual, positions = model.embed(tokens, at), model.positions(at)
    rows = layout.row_of  # of the residual and of the positions, by prefix
    for block in model.blocks:
        is_last = block is model.blocks[-1]
        wanted = rows[layout.prefix_of[:, -1]] if is_last else rows
        added = _attention(block, residual, positions, rows, layout, is_last)
        residual, positions = residual[:, wanted], None if positions is None else positions[:, wanted]
        residual = block.resid_post_attn(block._rectify(residual + added))
        residual = block.feed_forward(residual, positions)
        rows = torch.arange(len(wanted), device=rows.device)
    return model.unembed(residual, prefixes.input_ids[None, :, -1])[0]


def _attention(
    block: Block,
    residual: Float[Tensor, "1 rows d_model"],
    positions: Float[Tensor, "1 rows d_pos"] | None,
    rows: Int[Tensor, " prefixes"],
    layout: Layout,
    is_last: bool,
) -> Float[Tensor, "1 queries d_model"]:
    """What is added to the stream at every prefix, or in the last layer after every prompt's last token."""
    attn, read = block.attn, block.ln_1(residual)
    if positions is not None:
        read = torch.cat([read, block.ln_p1(positions)], dim=-1)
    q, k, v = attn.c_attn(attn.attn_in(read)).chunk(3, dim=-1)
    keys, allowed = rows[layout.prefix_of], layout.allowed
    k, v = at_tokens(attn.attn_k(k)[0], keys), at_tokens(attn.attn_v(v)[0], keys)
    sink = None if attn.attn_imp is None else attn.attn_imp.sink_logit
    if is_last:
        q = attn.attn_q(q[:, keys[:, -1]])[0, :, None]
        mixed = attend(q, k, v, allowed[:, :, -1:], attn.d_head, sink)[:, 0]
    else:
        mixed = attend(at_tokens(attn.attn_q(q)[0], keys), k, v, allowed, attn.d_head, sink).flatten(0, 1)[layout.met]
    return attn.attn_out(attn.c_proj(mixed[None]))


def at_tokens(x: Float[Tensor, "rows d"], rows: Int[Tensor, "n s"]) -> Float[Tensor, "n s d"]:
    """The rows that tokens have, `x[rows]`, whose backward pass is slower."""
    return F.embedding(rows, x)


def attend(
    q: Float[Tensor, "n s heads"],
    k: Float[Tensor, "n t heads"],
    v: Float[Tensor, "n t heads"],
    allowed: Bool[Tensor, "n 1 s t"],
    d_head: int,
    sink: Float[Tensor, " n_head"] | None,
) -> Float[Tensor, "n s heads"]:
    """What a sparse model's attention makes of q, k and v of any of its heads; `sink` has these heads' logits."""
    q, k, v = (rearrange(x, "n s (n_head d) -> n n_head s d", d=d_head) for x in (q, k, v))
    scores = ((q @ k.mT) * (1 / math.sqrt(d_head))).masked_fill(~allowed, torch.finfo(q.dtype).min)
    if sink is not None:
        slot = sink.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([slot, scores], dim=-1)
    weights = scores.softmax(-1)[..., 0 if sink is None else 1 :]
    return rearrange(weights @ v, "n n_head s d -> n s (n_head d)")
