"""feature(): what a node does on text: contexts of both signs, how often and how strongly it is active, its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridges.circuits.nodes import FINAL, Node, recorded_nodes
from bridges.circuits.pruning import frozen_and_fast
from bridges.circuits.text import mean_text
from bridges.models.loading import as_residual, find_tokenizer
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer

ROWS = 32
"""Rows of a forward pass."""
BEFORE, AFTER = 12, 4
"""Tokens of a context before and after the one that is shown."""
PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


@dataclass(frozen=True)
class Context:
    """A token of text with what stands around it, and the node's value at each of these tokens."""

    row: int
    position: int
    value: float
    tokens: list[str]
    values: list[float]
    at: int
    """Which of the tokens it is."""

    def __str__(self) -> str:
        text = "".join(f"⟦{t}⟧" if i == self.at else t for i, t in enumerate(self.tokens))
        return f"{self.value:+8.3f}  {text!r}"


@dataclass(frozen=True)
class Feature:
    """What a node does on text."""

    node: str
    tokens: int
    """Tokens of the text."""
    density: float
    """The share of tokens at which the node is not zero."""
    mean: float
    percentiles: dict[str, float]
    """Of its values where it is not zero; empty where it never is."""
    positive: list[Context]
    """The tokens of largest value, no two in one row if there are enough; only values over 0."""
    negative: list[Context]
    """The tokens of smallest value, only values under 0: both signs mean something."""
    random: list[Context]
    """Tokens at which it is not zero, drawn evenly."""
    weights_in: list[tuple[str, float]]
    """The nodes it reads from, and tokens that write to its stream channel, with their weights, largest first."""
    weights_out: list[tuple[str, float]]
    """The nodes that read it, and tokens whose logits it moves."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.node}: active at {self.density:.2%} of {self.tokens} tokens, mean {self.mean:.3f}"]
        if self.percentiles:
            lines.append("where active: " + ", ".join(f"{k} % {v:.3f}" for k, v in self.percentiles.items()))
        for title, contexts in (
            ("most positive", self.positive),
            ("most negative", self.negative),
            ("random", self.random),
        ):
            lines += [f"{title}:", *(f"  {context}" for context in contexts)] if contexts else [f"{title}: none"]
        for title, weights in (("weights in", self.weights_in), ("weights out", self.weights_out)):
            lines.append(f"{title}: " + (", ".join(f"{name} {weight:+.3f}" for name, weight in weights) or "none"))
        return "\n".join(lines)


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
    model = _sparse(sparse)
    place, index = Node.parse(node, model)
    found = []
    with frozen_and_fast(model), recorded_nodes(model, [place]) as values:
        for ids in text.split(ROWS):
            model(ids.to(model.device), use_cache=False)
            found.append(values[place][..., index].cpu())
    return torch.cat(found)


def feature(
    sparse: nn.Module | ResidualModel | str | Path,
    node: str,
    text: Int[Tensor, "rows seq"] | None = None,
    *,
    tokenizer: Any = None,
    contexts: int = 8,
    weights: int = 12,
    text_tokens: int = 65_536,
    seed: int = 0,
) -> Feature:
    """Look at what a node of a weight-sparse transformer does.

    Args:
        sparse: a `SparseTransformer`: an object, a folder or a hub id.
        node: as `1.attn.read.118`.
        text: token rows; by default the bundled corpus where its tokenizer is the model's, else sampled rows.
        tokenizer: turns tokens into text; by default the one saved with the model, else tokens are shown as numbers.
        contexts: how many of each kind.
        weights: how many of each side.
        text_tokens: tokens of the text that are used, at most.
        seed: of the random contexts, and of the text where none is given.

    Raises ValueError if the model has no such node.

    >>> import bridges
    >>> pair = bridges.load_pair()
    >>> found = feature(pair.sparse, "final.read.5", tokenizer=pair.tokenizer, text_tokens=2048, contexts=2)
    >>> found.node, found.tokens, len(found.random) <= 2
    ('final.read.5', 2048, True)
    """
    model = _sparse(sparse)
    Node.parse(node, model)
    known = tokenizer if tokenizer is not None else find_tokenizer(sparse)
    rows = torch.cat([ids for ids, _ in mean_text(model, text, known, text_tokens, seed)])
    values = node_activations(model, node, rows)
    active = values[values != 0]
    names = _token_names(known, model.config.vocab_size)
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


def _token_names(tokenizer: Any, vocab_size: int) -> list[str]:
    """The text of every token, or its number in brackets where there is no tokenizer."""
    if tokenizer is None:
        return [f"[{i}]" for i in range(vocab_size)]
    known = len(tokenizer)
    return [tokenizer.decode([i]) if i < known else f"[{i}]" for i in range(vocab_size)]


def _sparse(sparse: nn.Module | ResidualModel | str | Path) -> SparseTransformer:
    model = as_residual(sparse).model
    if not isinstance(model, SparseTransformer):
        raise ValueError(f"sparse={type(model).__name__} must be a SparseTransformer; other models have no such nodes")
    return model
