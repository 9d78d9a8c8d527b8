"""Which nodes lie on a path of nonzero weights, from a token to an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bridges.circuits.nodes import FINAL, place_sizes
from bridges.models.sparse.model import SparseTransformer

Masks = Mapping[str, Bool[Tensor, " _"]]


@torch.no_grad()
def on_paths(
    model: SparseTransformer, tokens: Sequence[int], answers: Sequence[int], on: Masks | None = None
) -> dict[str, Bool[Tensor, " _"]]:
    """The nodes that a path of nonzero weights through nodes that are on joins to a token and to an answer.

    What a node is frozen at may differ from zero, so a head whose q or k moves is a path through all of its output, and
    a q channel counts unless the k channel that it is multiplied with is always zero. That norms and AbsTopK tie all
    channels of a place together is not counted as a path.

    Args:
        model: the sparse model.
        tokens: that the prompts may hold.
        answers: tokens whose logits count.
        on: nodes that a path may use, by place; None: all.
    """
    device = model.device
    allowed = {p: torch.ones(n, dtype=torch.bool, device=device) for p, n in place_sizes(model).items()}
    if on is not None:
        allowed = {place: mask & on[place].to(device) for place, mask in allowed.items()}
    forward = _forward(model, allowed, tokens)
    backward = _backward(model, forward, answers)
    return {place: forward[place] & backward[place] for place in allowed}


def _forward(model: SparseTransformer, allowed: Masks, tokens: Sequence[int]) -> dict[str, Tensor]:
    """The allowed nodes that a token can move."""
    width, found = model.config.d_model, {}
    stream = (model.transformer.wte.weight[list(tokens)] != 0).any(0)
    if model.config.d_pos_emb is None:
        stream = stream | (model.transformer.wpe.weight != 0).any(0)
    for layer, block in enumerate(model.blocks):

        def node(kind: str, moved: Tensor, layer: int = layer) -> Tensor:
            found[f"{layer}.{kind}"] = moved & allowed[f"{layer}.{kind}"]
            return found[f"{layer}.{kind}"]

        read = node("attn.read", _with_positions(stream, block.attn.c_attn.in_features))
        q, k, v = _moved(block.attn.c_attn.weight, read).chunk(3)
        zero_q, zero_k, _ = _always_zero(block.attn.c_attn).chunk(3)
        q, k, v = node("attn.q", q & ~zero_k), node("attn.k", k & ~zero_q), node("attn.v", v)
        heads = (block.attn.n_head, block.attn.d_head)
        attends = (q | k).view(heads).any(1, keepdim=True).expand(heads).flatten()
        stream = stream | node("attn.write", _moved(block.attn.c_proj.weight, v | attends))
        read = node("mlp.read", _with_positions(stream, block.mlp.c_fc.in_features))
        neuron = node("mlp.neuron", _moved(block.mlp.c_fc.weight, read))
        stream = stream | node("mlp.write", _moved(block.mlp.c_proj.weight, neuron))
    found[FINAL] = stream[:width] & allowed[FINAL]
    return found


def _backward(model: SparseTransformer, moved: Masks, answers: Sequence[int]) -> dict[str, Tensor]:
    """The nodes that can move an answer's logit."""
    width, found = model.config.d_model, {}
    found[FINAL] = (model.lm_head.weight[list(answers)] != 0).any(0) & moved[FINAL]
    wanted = found[FINAL]  # channels of the stream that a later node reads
    for layer in reversed(range(len(model.blocks))):
        block = model.blocks[layer]

        def node(kind: str, used: Tensor, layer: int = layer) -> Tensor:
            found[f"{layer}.{kind}"] = used & moved[f"{layer}.{kind}"]
            return found[f"{layer}.{kind}"]

        write = node("mlp.write", wanted)
        neuron = node("mlp.neuron", _moved(block.mlp.c_proj.weight.T, write))
        wanted = wanted | node("mlp.read", _moved(block.mlp.c_fc.weight.T, neuron))[:width]
        write = node("attn.write", wanted)
        output = _moved(block.attn.c_proj.weight.T, write)
        v, heads = node("attn.v", output), (block.attn.n_head, block.attn.d_head)
        used = output.view(heads).any(1, keepdim=True).expand(heads).flatten()
        q, k = node("attn.q", used), node("attn.k", used)
        wanted = wanted | node("attn.read", _moved(block.attn.c_attn.weight.T, torch.cat([q, k, v])))[:width]
    return found


def _moved(weight: Float[Tensor, "n_out n_in"], inputs: Bool[Tensor, " n_in"]) -> Bool[Tensor, " n_out"]:
    """The rows that have a nonzero weight for one of the inputs."""
    return (weight[:, inputs] != 0).any(1)


def _always_zero(linear: nn.Linear) -> Bool[Tensor, " n_out"]:
    """The outputs that have neither a weight nor a bias."""
    zero = (linear.weight == 0).all(1)
    return zero if linear.bias is None else zero & (linear.bias == 0)


def _with_positions(stream: Bool[Tensor, " d"], width: int) -> Bool[Tensor, " read"]:
    """The channels of a read: the stream's, then the positions', which differ from token to token."""
    return torch.cat([stream, stream.new_ones(width - len(stream))])
