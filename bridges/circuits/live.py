"""A training pass of masks that computes with the nodes that are on where these are few."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.circuits.columns import Columns, Live, Matrix, add_masked, read_columns, topk_columns
from bridges.circuits.masks import Masks, masked
from bridges.circuits.nodes import FINAL, place_sizes, replaced_nodes
from bridges.circuits.prefixes import Layout, Prefixes, at_tokens, attend, embeds_positions, last_logits
from bridges.models.sparse.blocks import Block
from bridges.models.sparse.model import SparseTransformer

QKV = ("attn.q", "attn.k", "attn.v")
MAX_LIVE = 1 / 16
"""Up to this part of the model's nodes on, `live_logits` is faster than the whole pass (benchmarks/bench_prune.py)."""


class MaskedPass:
    """The logits of a model under masks, by whichever pass is faster. Weights must not change between its calls."""

    def __init__(self, model: SparseTransformer):
        self.model = model
        self._max_live = MAX_LIVE * sum(place_sizes(model).values())
        self._matrices = [
            _Matrices(*map(Matrix.of, (block.attn.c_attn, block.mlp.c_fc, block.mlp.c_proj))) for block in model.blocks
        ]

    def logits(self, prefixes: Prefixes, masks: Masks) -> Float[Tensor, "n vocab"]:
        """After the last token of every prompt, with gradients of the masks' parameters."""
        if self._few_are_on(masks):
            return self.live_logits(prefixes, masks)
        with masks.applied(self.model):
            return last_logits(self.model, prefixes)

    def _few_are_on(self, masks: Masks) -> bool:
        """Never on a GPU, where counting would make every step wait, and shapes that differ from step to step too."""
        return self.model.device.type == "cpu" and sum(int(on.sum()) for on in masks.on().values()) <= self._max_live

    def live_logits(self, prefixes: Prefixes, masks: Masks) -> Float[Tensor, "n vocab"]:
        """By the pass that computes what depends on nodes that are on, and constants once."""
        model = self.model
        layout = Layout.of(prefixes, embeds_positions(model))
        tokens, at = layout.tokens[None], layout.positions[None]
        residual, positions = model.embed(tokens, at)[0], model.positions(at)
        positions = None if positions is None else positions[0]
        rows = layout.row_of
        for i, block in enumerate(model.blocks):
            layer, is_last = _Layer(block, i, masks, self._matrices[i]), i + 1 == len(model.blocks)
            wanted = rows[layout.prefix_of[:, -1]] if is_last else rows
            added = layer.attention(residual, positions, rows, layout, is_last)
            added = residual[wanted] + added
            positions = None if positions is None else positions[wanted]
            residual = block.resid_post_attn(added.relu() if block.rectified else added)
            residual = layer.feed_forward(residual, positions)
            rows = torch.arange(len(wanted), device=rows.device)
        final = partial(masked, parameter=masks.parameters[FINAL], mean=masks.means[FINAL])
        with replaced_nodes(model, {FINAL: final}):
            return model.unembed(residual[None], prefixes.input_ids[None, :, -1])[0]


class _Matrices(NamedTuple):
    """Those of a layer whose inputs are nodes."""

    c_attn: Matrix
    c_fc: Matrix
    c_proj: Matrix


class _Layer:
    """One layer under masks."""

    def __init__(self, block: Block, layer: int, masks: Masks, matrices: _Matrices):
        self.block, self.matrices = block, matrices
        places = {place.partition(".")[2]: place for place in masks.parameters if place.startswith(f"{layer}.")}
        self.parameters = {kind: masks.parameters[place] for kind, place in places.items()}
        self.means = {kind: masks.means[place] for kind, place in places.items()}

    def on(self, kind: str) -> Bool[Tensor, " _"]:
        """Which nodes of a kind of place are on."""
        return self.parameters[kind].detach() > 0

    def feed_forward(
        self, residual: Float[Tensor, "rows d_model"], positions: Float[Tensor, "rows d_pos"] | None
    ) -> Float[Tensor, "rows d_model"]:
        """The stream after the MLP."""
        block, mlp = self.block, self.block.mlp
        positions = None if positions is None else block.ln_p2(positions)
        read = read_columns(block.ln_2, mlp.mlp_in, residual, positions, self.on("mlp.read"))
        pre = self._linear(self.matrices.c_fc, read, "mlp.read", self.on("mlp.neuron"))
        neurons = topk_columns(mlp.mlp_neuron, Columns(mlp.act(pre.constant), pre.index, mlp.act(pre.values)))
        neurons = neurons.live(self.on("mlp.neuron"))
        write = self._linear(self.matrices.c_proj, neurons, "mlp.neuron", self.on("mlp.write"))
        write = topk_columns(mlp.mlp_out, write).live(self.on("mlp.write"))
        added = add_masked(residual, write, self.parameters["mlp.write"], self.means["mlp.write"])
        return block.resid_post_mlp(added.relu() if block.rectified else added)

    def attention(
        self,
        residual: Float[Tensor, "rows d_model"],
        positions: Float[Tensor, "rows d_pos"] | None,
        rows: Int[Tensor, " prefixes"],
        layout: Layout,
        is_last: bool,
    ) -> Float[Tensor, "queries d_model"]:
        """What is added to the stream at every prefix, or in the last layer after every prompt's last token."""
        block, attn = self.block, self.block.attn
        positions = None if positions is None else block.ln_p1(positions)
        read = read_columns(block.ln_1, attn.attn_in, residual, positions, self.on("attn.read"))
        wanted = torch.cat([self.on(kind) for kind in QKV])
        q, k, v = self._linear(self.matrices.c_attn, read, "attn.read", wanted).split(3)
        keys, allowed, met = rows[layout.prefix_of], layout.allowed, layout.met
        queries = keys
        if is_last:  # only rows that are queries have a q, one for every prompt
            q, allowed = q.take(keys[:, -1]), allowed[:, :, -1:]
            queries = met = torch.arange(len(keys), device=rows.device)
            queries = queries[:, None]
        q, k, v = (topk_columns(*one) for one in ((attn.attn_q, q), (attn.attn_k, k), (attn.attn_v, v)))
        mixed = self._mixed((q, k, v), (queries, keys, keys), allowed, met)
        return masked(attn.attn_out(attn.c_proj(mixed)), self.parameters["attn.write"], self.means["attn.write"])

    def _mixed(
        self,
        qkv: tuple[Columns, ...],
        rows: tuple[Int[Tensor, "n _"], ...],
        allowed: Bool[Tensor, "n 1 s t"],
        met: Int[Tensor, " queries"],
    ) -> Float[Tensor, "queries heads"]:
        """What attention makes of the masked q, k and v at these rows of each, where the queries are met."""
        attn, heads = self.block.attn, self._live_heads()
        sink = None if attn.attn_imp is None else attn.attn_imp.sink_logit
        q, k, v = (
            at_tokens(self._masked(x.expanded(), kind, heads), of) for x, kind, of in zip(qkv, QKV, rows, strict=True)
        )
        mixed = attend(q, k, v, allowed, attn.d_head, None if sink is None else sink[heads]).flatten(0, 1)[met]
        n_keys = allowed.sum(-1).flatten()[met]
        constant = self._constant_heads(allowed.shape[-1], sink)[n_keys - 1]
        return constant.index_copy(1, self._channels(heads), mixed)

    def _linear(self, matrix: Matrix, x: Live, kind: str, wanted: Bool[Tensor, " n_out"]) -> Columns:
        return matrix.masked(x, self.parameters[kind], self.means[kind], wanted)

    def _masked(self, x: Float[Tensor, "rows heads"], kind: str, heads: Int[Tensor, " live"]) -> Tensor:
        """The values of some heads after the mask."""
        channels = self._channels(heads)
        return masked(x[:, channels], self.parameters[kind][channels], self.means[kind][channels])

    def _live_heads(self) -> Int[Tensor, " live"]:
        """The heads of which a node is on, or that a write that is on reads; others are constants without effect."""
        attn = self.block.attn
        used = (attn.c_proj.weight[self.on("attn.write")] != 0).any(0)
        for kind in QKV:
            used = used | self.on(kind)
        return used.view(attn.n_head, attn.d_head).any(1).nonzero().squeeze(1)

    def _channels(self, heads: Int[Tensor, " live"]) -> Int[Tensor, " channels"]:
        d_head = self.block.attn.d_head
        return (heads[:, None] * d_head + torch.arange(d_head, device=heads.device)).flatten()

    def _constant_heads(self, seq: int, sink: Float[Tensor, " n_head"] | None) -> Float[Tensor, "seq heads"]:
        """What attention makes of q, k and v at their means, by how many keys it has."""
        q, k, v = (self.means[kind].expand(1, seq, -1) for kind in QKV)
        allowed = torch.ones(1, 1, seq, seq, dtype=torch.bool, device=q.device).tril()
        return attend(q, k, v, allowed, self.block.attn.d_head, sink)[0]
