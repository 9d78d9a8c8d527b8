"""Widening a trained sparse model without changing what it computes: room for channels to specialise."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridges.models.sparse.config import SparseConfig
from bridges.models.sparse.model import SparseTransformer

WIDTHS = ("d_model", "d_mlp", "n_head")
"""The sizes that are multiplied; `d_head`, and with it the scale of attention, stays."""


@torch.no_grad()
def widen(sparse: SparseTransformer, factor: int = 2, seed: int = 0) -> SparseTransformer:
    """A new model, `factor` times as wide in stream, neurons and heads, with the same logits (up to rounding).

    Every channel, neuron and head becomes `factor` copies with the same value. Each copy reads what the original read,
    and where the original read one channel, each copy reads a copy of its own, drawn by `seed`: rows and columns of the
    matrices keep their number of nonzeros, and an embedding row gets `factor` times as many. Training then lets the
    copies go different ways. AbsTopK keeps `factor` times as many entries, the same ones.

    Raises ValueError for a model with tied embeddings or concatenated positions, which have no such copies, and where
    AbsTopK would not keep whole sets of copies.

    >>> model = SparseTransformer(SparseConfig(vocab_size=11, n_layer=1, d_model=32, block_size=8)).eval()
    >>> wide, ids = widen(model), torch.tensor([[1, 2, 3]])
    >>> wide.config.d_model, bool(torch.allclose(wide(ids).logits, model(ids).logits, atol=1e-5))
    (64, True)
    """
    config = _wider_config(sparse.config, factor)
    wide = SparseTransformer(config).train(sparse.training)
    nn.Module.to(wide, sparse.device, sparse.dtype)
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(wide.named_parameters())
    for name, value in sparse.named_parameters():
        parameters[name].copy_(_widened(name, value, factor, generator))
    wide.generation_config = sparse.generation_config
    wide._freeze_fixed()  # a `wpe` of zeros does not train
    return wide


def _widened(name: str, value: Tensor, factor: int, generator: torch.Generator) -> Tensor:
    """The parameter of this name in the wide model."""
    module = name.split(".")[-2:-1]
    stacked = 3 if module == ["c_attn"] else 1  # q, k and v, one after the other
    if name in ("final_logits_bias", "bigram_table"):
        return value
    if name == "lm_head.weight":
        return _place(value, _random_copy(value, factor, generator), factor)
    if module in (["wte"], ["wpe"]):
        return value.repeat(1, factor)
    if value.ndim == 1:
        return torch.cat([part.repeat(factor) for part in value.chunk(stacked)])
    return torch.cat([_copy_matrix(part, factor, generator) for part in value.chunk(stacked)])


def _wider_config(config: SparseConfig, factor: int) -> SparseConfig:
    if factor < 2:
        raise ValueError(f"factor={factor} must be at least 2")
    if config.tied_unembed:
        raise ValueError("tied_unembed=True: an embedding's copies sum up in the unembedding; widen an untied model")
    if config.d_pos_emb is not None:
        raise ValueError(f"d_pos_emb={config.d_pos_emb}: AbsTopK counts position channels, which have no copies")
    wider = SparseConfig(**{**config.to_dict(), **{name: factor * getattr(config, name) for name in WIDTHS}})
    for location in config.locations:
        kept, kept_before = wider.kept(location), config.kept(location)
        if kept_before is not None and kept != factor * kept_before:
            raise ValueError(
                f"{config.fraction_at(location)} keeps {kept_before} entries at {location}, and {kept} when widened"
            )
    return wider


def _copy_matrix(weight: Float[Tensor, "out in"], factor: int, generator: torch.Generator) -> Float[Tensor, "o i"]:
    """Copies of the outputs, each entry at one copy of its input, another one for every copy of the output."""
    first = _random_copy(weight, factor, generator)
    return torch.cat([_place(weight, (first + copy) % factor, factor) for copy in range(factor)])


def _random_copy(weight: Float[Tensor, "out in"], factor: int, generator: torch.Generator) -> Int[Tensor, "out in"]:
    return torch.randint(factor, weight.shape, generator=generator).to(weight.device)


def _place(weight: Float[Tensor, "out in"], copy: Int[Tensor, "out in"], factor: int) -> Float[Tensor, "out wider"]:
    """Each entry at the given copy of its input."""
    return torch.cat([weight * (copy == index) for index in range(factor)], dim=1)
