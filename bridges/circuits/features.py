"""What a node of a weight-sparse transformer does on text: its contexts of both signs, its figures, its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridges.circuits.feature_view import Context, Feature
from bridges.circuits.nodes import FINAL, Node, recorded_nodes
from bridges.circuits.pruning import frozen_and_fast
from bridges.models.loading import as_residual
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.tasks.pairs import TaskPairs

ROWS = 32
"""Rows of a forward pass."""
BEFORE, AFTER = 12, 4
"""Tokens of a context before and after the one that is shown."""
PROMPT_PAIRS = 2
"""Pairs of a task whose prompts are shown."""
PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


@torch.no_grad()
def node_activations(
    sparse: nn.Module | ResidualModel | str | Path, node: str, text: Int[Tensor, "rows seq"]
) -> Float[Tensor, "rows seq"]:
    """A node's value at every token of some rows; ValueError if the model has no such node.

    >>> import bridges, torch
    >>> pair = bridges.load_pair()
    >>> node_activations(pair.sparse, "1.attn.read.118", torch.randint(1024, (2, 8))).shape
    torch.Size([2, 8])
    """
    model = sparse_transformer(sparse)
    place, index = Node.parse(node, model)
    found = []
    with frozen_and_fast(model), recorded_nodes(model, [place]) as values:
        for ids in text.split(ROWS):
            model(ids.to(model.device), use_cache=False)
            found.append(values[place][..., index].cpu())
    return torch.cat(found)


@torch.no_grad()
def prompt_contexts(model: SparseTransformer, node: str, pairs: TaskPairs, names: list[str]) -> list[Context]:
    """A node's values on both prompts of a task's first pairs, each marked where the node is largest.

    `names`: the text of every token. A context's `row` is the pair's index.
    """
    parsed, contexts = Node.parse(node), []
    for i in range(min(PROMPT_PAIRS, len(pairs))):
        for ids in (pairs.input_ids, pairs.counterfactual_ids):
            row = ids[i][pairs.attention_mask[i].bool()][None]
            with recorded_nodes(model, [parsed.place]) as recorded:
                model(row.to(model.device), use_cache=False)
                values = recorded[parsed.place][0, :, parsed.index].cpu()
            at = int(values.abs().argmax())
            tokens = [names[token] for token in row[0].tolist()]
            contexts.append(Context(i, at, values[at].item(), tokens, values.tolist(), at))
    return contexts


def describe_node(
    model: SparseTransformer,
    node: str,
    rows: Int[Tensor, "rows seq"],
    values: Float[Tensor, "rows seq"],
    names: list[str],
    contexts: int,
    weights: int,
    seed: int,
) -> Feature:
    """A node's contexts, figures and weights, from its `values` on text.

    `names`: the text of every token; `contexts` of each kind and `weights` of each side, at most; `seed` of the random
    contexts.
    """
    active = values[values != 0]
    extremes = [_extreme(values, sign, contexts) for sign in (1, -1)]
    drawn = (values != 0).nonzero()
    drawn = drawn[torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))[:contexts]]
    positive, negative, random = (
        [_context(rows, values, names, row, position) for row, position in chosen.tolist()]
        for chosen in (*extremes, drawn)
    )
    quantiles = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    percentiles = active.double().quantile(quantiles).tolist() if len(active) else []
    sources, targets = neighbours(model, node, names)
    return Feature(
        node,
        values.numel(),
        len(active) / values.numel(),
        values.double().mean().item(),
        dict(zip(map(str, PERCENTILES), percentiles, strict=False)),
        positive,
        negative,
        random,
        sources[:weights],
        targets[:weights],
    )


@torch.no_grad()
def neighbours(
    model: SparseTransformer, node: str, names: list[str]
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """The nodes and tokens that a node gets from and gives to by one nonzero weight, the largest first.

    A read's sources are the writes and the token embeddings of its stream channel; a write's targets are the reads of
    its channel in later sublayers, each with weight 1, and `final.read`.
    """
    place, index = Node.parse(node, model)
    sources: list[tuple[str, float]] = []
    targets: list[tuple[str, float]] = []
    layer_text, _, kind = place.partition(".")
    last, width = len(model.blocks), model.config.d_model

    def add(into: list[tuple[str, float]], name: str, weights: Tensor) -> None:
        for i in weights.nonzero().flatten().tolist():
            into.append((f"{name}.{i}", weights[i].item()))

    def add_tokens(into: list[tuple[str, float]], weights: Tensor) -> None:
        for i in weights.nonzero().flatten().tolist():
            into.append((f"token {names[i]}", weights[i].item()))

    if place == FINAL or kind.endswith("read"):
        site = 2 * last if place == FINAL else 2 * int(layer_text) + (kind == "mlp.read")
        if index < width:
            add_tokens(sources, model.transformer.wte.weight[:, index])
            writes = [f"{i // 2}.{'mlp' if i % 2 else 'attn'}.write" for i in range(site)]
            sources += [(f"{write}.{index}", 1.0) for write in writes if _writes(model, write, index)]
    if place == FINAL:
        add_tokens(targets, model.lm_head.weight[:, index])
        return _sorted(sources), _sorted(targets)
    layer = int(layer_text)
    block = model.blocks[layer]
    c_attn = dict(zip("qkv", block.attn.c_attn.weight.chunk(3), strict=True))
    if kind == "attn.read":
        for name, weight in c_attn.items():
            add(targets, f"{layer}.attn.{name}", weight[:, index])
    elif kind in ("attn.q", "attn.k", "attn.v"):
        add(sources, f"{layer}.attn.read", c_attn[kind[-1]][index])
        if kind == "attn.v":
            add(targets, f"{layer}.attn.write", block.attn.c_proj.weight[:, index])
    elif kind == "mlp.read":
        add(targets, f"{layer}.mlp.neuron", block.mlp.c_fc.weight[:, index])
    elif kind == "mlp.neuron":
        add(sources, f"{layer}.mlp.read", block.mlp.c_fc.weight[index])
        add(targets, f"{layer}.mlp.write", block.mlp.c_proj.weight[:, index])
    else:
        inputs = block.attn.c_proj if kind == "attn.write" else block.mlp.c_proj
        add(sources, f"{layer}.{'attn.v' if kind == 'attn.write' else 'mlp.neuron'}", inputs.weight[index])
        site = 2 * layer + 1 + (kind == "mlp.write")
        reads = [f"{i // 2}.{'mlp' if i % 2 else 'attn'}.read" for i in range(site, 2 * last)]
        targets += [(f"{read}.{index}", 1.0) for read in [*reads, FINAL] if _reads(model, read, index)]
    return _sorted(sources), _sorted(targets)


def _writes(model: SparseTransformer, place: str, channel: int) -> bool:
    """Whether a sublayer has a weight or a bias to this stream channel."""
    layer, kind, _ = place.split(".")
    block = model.blocks[int(layer)]
    matrix = (block.attn if kind == "attn" else block.mlp).c_proj
    return bool(matrix.weight[channel].any()) or (matrix.bias is not None and bool(matrix.bias[channel] != 0))


def _reads(model: SparseTransformer, place: str, channel: int) -> bool:
    """Whether a sublayer, or the unembedding, has a weight from this channel."""
    if place == FINAL:
        return bool(model.lm_head.weight[:, channel].any())
    layer, kind, _ = place.split(".")
    block = model.blocks[int(layer)]
    return bool((block.attn.c_attn if kind == "attn" else block.mlp.c_fc).weight[:, channel].any())


def _sorted(weights: list[tuple[str, float]]) -> list[tuple[str, float]]:
    return sorted(weights, key=lambda pair: (-abs(pair[1]), pair[0]))


def _extreme(values: Float[Tensor, "rows seq"], sign: int, count: int) -> Int[Tensor, "n 2"]:
    """The tokens of largest sign * value over 0: first the best of each row, then others if these are too few."""
    signed = values * sign
    best = signed.max(1)
    by_row = best.values.argsort(descending=True, stable=True)
    chosen = [(int(row), int(best.indices[row])) for row in by_row if best.values[row] > 0][:count]
    for flat in signed.flatten().argsort(descending=True, stable=True)[: 2 * count].tolist():
        place = divmod(flat, values.shape[1])
        if len(chosen) < count and place not in chosen and signed[place] > 0:
            chosen.append(place)
    return torch.tensor(chosen, dtype=torch.long).view(-1, 2)


def _context(
    rows: Int[Tensor, "rows seq"], values: Float[Tensor, "rows seq"], names: list[str], row: int, position: int
) -> Context:
    start, stop = max(0, position - BEFORE), min(rows.shape[1], position + AFTER + 1)
    tokens = [names[token] for token in rows[row, start:stop].tolist()]
    around = values[row, start:stop].tolist()
    return Context(row, position, values[row, position].item(), tokens, around, position - start)


def token_names(tokenizer: Any, vocab_size: int) -> list[str]:
    """The text of every token, or its number in brackets where there is no tokenizer."""
    if tokenizer is None:
        return [f"[{i}]" for i in range(vocab_size)]
    known = len(tokenizer)
    return [tokenizer.decode([i]) if i < known else f"[{i}]" for i in range(vocab_size)]


def sparse_transformer(sparse: nn.Module | ResidualModel | str | Path) -> SparseTransformer:
    """The sparse model that is given, or is at a folder or hub id; ValueError if it is one of another kind."""
    model = as_residual(sparse).model
    if not isinstance(model, SparseTransformer):
        raise ValueError(f"sparse={type(model).__name__} must be a SparseTransformer; other models have no such nodes")
    return model
