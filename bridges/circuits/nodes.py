"""The nodes of a weight-sparse transformer, and the one mechanism that records, ablates and masks them.

A node is one channel at one of nine places, the same for all tokens and prompts (method, section 6): what a sublayer
reads, its q, k, v, its neurons and what it writes, each after AbsTopK, and what the unembedding reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import repeat
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridges.models.modes import eval_mode, uncompiled
from bridges.models.sparse.model import SparseTransformer
from bridges.models.tokens import Batch

FINAL = "final.read"
"""The place that the unembedding reads from."""
ROWS_PER_PASS = 8
"""Rows of text whose nodes are computed at once; of more, the values of a layer do not stay in a processor's cache."""
ROWS_PER_SUM = 256
_MODULES = {
    "attn.read": "attn.attn_in",
    "attn.q": "attn.attn_q",
    "attn.k": "attn.attn_k",
    "attn.v": "attn.attn_v",
    "attn.write": "attn.attn_out",
    "mlp.read": "mlp.mlp_in",
    "mlp.neuron": "mlp.mlp_neuron",
    "mlp.write": "mlp.mlp_out",
}
"""The kinds of places of a layer in the order of computation, and the modules whose output they are."""


class Node(NamedTuple):
    """One channel of one place, written `1.attn.read.118`."""

    place: str
    index: int

    @classmethod
    def parse(cls, text: str, model: SparseTransformer | None = None) -> Node:
        """From `1.attn.read.118`; ValueError if it is none, or if `model` has no such node.

        >>> Node.parse("1.attn.read.118")
        Node(place='1.attn.read', index=118)
        """
        place, _, index = text.rpartition(".")
        layer, _, kind = place.partition(".")
        if not index.isdecimal() or not (place == FINAL or (layer.isdecimal() and kind in _MODULES)):
            raise ValueError(
                f"node={text!r} must be LAYER.PLACE.INDEX, as 1.attn.read.118; places are {', '.join(_MODULES)}"
            )
        if model is not None:
            sizes = place_sizes(model)
            if place not in sizes:
                raise ValueError(f"node={text!r} is not in the model, which has {len(model.blocks)} layers, from 0 on")
            if int(index) >= sizes[place]:
                raise ValueError(f"node={text!r} is not in the model; {place} has {sizes[place]} nodes, from 0 on")
        return cls(place, int(index))

    def __str__(self) -> str:
        return f"{self.place}.{self.index}"


def place_modules(model: SparseTransformer) -> dict[str, nn.Module]:
    """The module whose output each place is, in the order of computation."""
    found = {
        f"{layer}.{kind}": block.get_submodule(path)
        for layer, block in enumerate(model.blocks)
        for kind, path in _MODULES.items()
    }
    return {**found, FINAL: model.transformer.ln_f}


def place_sizes(model: SparseTransformer) -> dict[str, int]:
    """How many nodes each place has."""
    found = {}
    for layer, block in enumerate(model.blocks):
        reads, width = block.attn.c_attn.in_features, model.config.d_model
        heads = block.attn.n_head * block.attn.d_head
        sizes = (reads, heads, heads, heads, width, reads, block.mlp.c_fc.out_features, width)
        found |= {f"{layer}.{kind}": size for kind, size in zip(_MODULES, sizes, strict=True)}
    return {**found, FINAL: model.config.d_model}


@contextmanager
def replaced_nodes(
    model: SparseTransformer, replacements: Mapping[str, Callable[[Float[Tensor, "b s d"]], Tensor]]
) -> Iterator[None]:
    """Inside, the values of each given place are what its function makes of them; for recording it returns them.

    Contexts may be nested: an inner one gets what an outer one returned.
    """
    modules = place_modules(model)
    with uncompiled(), ExitStack() as stack:
        for place, function in replacements.items():
            handle = modules[place].register_forward_hook(lambda module, args, output, f=function: f(output))
            stack.callback(handle.remove)
        yield


@contextmanager
def recorded_nodes(model: SparseTransformer, places: Iterable[str] | None = None) -> Iterator[dict[str, Tensor]]:
    """Inside, every forward pass leaves its values [batch, seq, d] of the given places (default: all) in the dict."""
    values: dict[str, Tensor] = {}

    def recorder(place: str) -> Callable[[Tensor], Tensor]:
        def record(x: Tensor) -> Tensor:
            values[place] = x
            return x

        return record

    chosen = place_modules(model) if places is None else places
    with replaced_nodes(model, {place: recorder(place) for place in chosen}):
        yield values


@torch.no_grad()
def node_means(model: SparseTransformer, batches: Iterable[Batch]) -> dict[str, Float[Tensor, " _"]]:
    """Each node's mean over the real tokens of some text, by place: what an ablated node is frozen at.

    Raises ValueError if there are no tokens.
    """
    sums = {place: torch.zeros(size, dtype=torch.float64) for place, size in place_sizes(model).items()}
    tokens = 0
    with eval_mode(model), recorded_nodes(model) as values:
        for ids, mask in _passes(batches, model.device):
            model(ids, attention_mask=mask, use_cache=False)
            tokens += ids.numel() if mask is None else int(mask.sum())
            for place, x in values.items():
                sums[place] += _sums(x.flatten(0, 1) if mask is None else x[mask.bool()]).cpu()
    if not tokens:
        raise ValueError("text has no tokens; node means need some")
    return {place: (total / tokens).to(model.dtype) for place, total in sums.items()}


def _passes(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The rows of the batches, a few at a time."""
    for input_ids, attention_mask in batches:
        masks = repeat(None) if attention_mask is None else attention_mask.to(device).split(ROWS_PER_PASS)
        yield from zip(input_ids.to(device).split(ROWS_PER_PASS), masks, strict=False)


def _sums(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Over rows, in float64; in blocks, since `x.sum(0, dtype=torch.float64)` is ten times slower on a CPU."""
    return torch.stack([block.double().sum(0) for block in x.split(ROWS_PER_SUM)]).sum(0)
