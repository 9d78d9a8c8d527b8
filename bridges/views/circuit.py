"""What the page shows of a circuit: its graph, what each node does for the task, attention patterns, its controls."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridges.circuits.circuit import Circuit
from bridges.circuits.features import neighbours
from bridges.circuits.masks import ablated
from bridges.circuits.necessity import necessity
from bridges.circuits.nodes import FINAL, Node, recorded_nodes
from bridges.circuits.pruning import frozen_and_fast
from bridges.circuits.task_loss import Presented, answer_differences, task_loss
from bridges.io.progress import Bar
from bridges.models.sparse.blocks import attention_pattern
from bridges.models.sparse.model import SparseTransformer
from bridges.tasks.pairs import TaskPairs
from bridges.views.controls import control_rows
from bridges.views.layout import column_orders

MAX_ABLATED = 500
"""Nodes of a circuit that are ablated one by one at most: each is a pass over the prompts."""
ABLATION_PAIRS = 24
"""Pairs that single nodes and layers are ablated on."""
MINUS = "\N{MINUS SIGN}"
"""As the page writes all negative figures."""
TOKENS_SHOWN = 4
"""Tokens that a read's embedding weights, or a final read's unembedding weights, are told of."""
PATTERN_PAIRS, MAX_PATTERNS = 2, 4
"""Pairs of prompts that attention patterns are shown of, and heads at most: those with most nodes of the circuit."""
_KINDS = {
    "attn.read": "attention reads",
    "attn.q": "queries",
    "attn.k": "keys",
    "attn.v": "values",
    "attn.write": "attention writes",
    "mlp.read": "MLP reads",
    "mlp.neuron": "neurons",
    "mlp.write": "MLP writes",
}


@torch.no_grad()
def circuit_view(
    model: SparseTransformer, circuit: Circuit, pairs: TaskPairs, names: Sequence[str], bar: Bar | None = None
) -> dict[str, Any]:
    """A circuit as the page's JSON has it.

    Figures are measured on `pairs`, which should be others than those that it was found on. `names`: the text of every
    token. `bar` advances by one for every node.
    """
    bar = bar or Bar()
    ids = [f"{place}.{i}" for place in circuit.masks(model) for i in circuit.nodes.get(place, ())]
    places = list(dict.fromkeys(place_of(node) for node in ids))
    columns = [places.index(place_of(node)) for node in ids]
    edges = [*_weight_edges(circuit, ids), *_stream_edges(ids)]
    orders = column_orders(columns, [(edge["source"], edge["target"]) for edge in edges])
    prompts = Presented.of(pairs.rows(0, ABLATION_PAIRS), model.device)
    with frozen_and_fast(model):
        fresh = circuit.evaluate(model, pairs)
        ablations = _ablations(model, circuit, prompts, ids, bar)
        without = necessity(model, circuit, pairs)
        by_layer = _ablation_by_layer(model, circuit, prompts)
        attention = _attention(model, circuit, pairs, names)
    return {
        "task": circuit.task,
        "columns": [{"place": place, "label": place_label(place)} for place in places],
        "nodes": [
            {
                "id": node,
                "column": column,
                "order": order,
                "mean": circuit.means[place_of(node)][Node.parse(node).index].item(),
                "ablation": ablation,
                "tokens": _tokens(model, node, names),
            }
            for node, column, order, ablation in zip(ids, columns, orders, ablations, strict=True)
        ],
        "edges": edges,
        "loss": circuit.loss,
        "loss_full_model": circuit.loss_full_model,
        "scale": circuit.scale,
        "shift": circuit.shift,
        "fresh": {"pairs": len(pairs), **fresh._asdict()},
        "ablated": {"loss": without["loss"], "accuracy": without["accuracy"]},
        "ablation_by_layer": by_layer,
        "attention": attention,
        **control_rows(circuit),
    }


def place_of(node: str) -> str:
    """The place of a node: `0.mlp.read` of `0.mlp.read.753`."""
    return node.rpartition(".")[0]


def place_label(place: str) -> str:
    """A place in words.

    >>> place_label("0.mlp.read"), place_label("final.read")
    ('layer 0 MLP reads', 'final reads')
    """
    if place == FINAL:
        return "final reads"
    layer, _, kind = place.partition(".")
    return f"layer {layer} {_KINDS[kind]}"


def _weight_edges(circuit: Circuit, ids: Sequence[str]) -> list[dict[str, Any]]:
    index = {node: i for i, node in enumerate(ids)}
    return [
        {"source": index[edge.source], "target": index[edge.target], "weight": edge.weight, "kind": "weight"}
        for edge in circuit.edges
    ]


def _stream_edges(ids: Sequence[str]) -> list[dict[str, Any]]:
    """From each write to the later reads of its channel: the residual stream carries it there, with weight 1."""
    reads = [(i, _depth(node), Node.parse(node).index) for i, node in enumerate(ids) if place_of(node).endswith("read")]
    return [
        {"source": i, "target": target, "weight": 1.0, "kind": "stream"}
        for i, node in enumerate(ids)
        if place_of(node).endswith("write")
        for target, depth, channel in reads
        if channel == Node.parse(node).index and depth > _depth(node)
    ]


def _depth(node: str) -> float:
    """The sublayer that a node is in: 2 * layer for attention, one more for the MLP."""
    layer, kind, *_ = node.split(".")
    return float("inf") if layer == "final" else 2.0 * int(layer) + (kind == "mlp")


def _loss(model: SparseTransformer, circuit: Circuit, prompts: Presented, off: Mapping[str, Iterable[int]]) -> float:
    """The circuit's loss, with its own scale and shift, when some of its nodes are frozen at their means too."""
    on = circuit.masks(model)
    for place, indices in off.items():
        on[place][list(indices)] = False
    with ablated(model, on, circuit.means):
        differences = answer_differences(model, prompts)
    return task_loss(differences, prompts.sign, circuit.scale, circuit.shift).item()


def _ablations(
    model: SparseTransformer, circuit: Circuit, prompts: Presented, ids: Sequence[str], bar: Bar
) -> list[float | None]:
    """What freezing each node alone adds to the circuit's loss; None for the nodes after the first `MAX_ABLATED`."""
    whole = _loss(model, circuit, prompts, {})
    changes: list[float | None] = []
    for i, node in enumerate(ids):
        parsed = Node.parse(node)
        off = {parsed.place: [parsed.index]}
        changes.append(_loss(model, circuit, prompts, off) - whole if i < MAX_ABLATED else None)
        bar.advance()
    return changes


def _ablation_by_layer(model: SparseTransformer, circuit: Circuit, prompts: Presented) -> list[dict[str, Any]]:
    """What freezing all of the circuit's nodes of a sublayer adds to its loss."""
    whole, layers = _loss(model, circuit, prompts, {}), {}
    for place, indices in circuit.nodes.items():
        if indices:
            layers.setdefault(place if place == FINAL else place.rpartition(".")[0], {})[place] = indices
    return [
        {"layer": "final" if layer == FINAL else layer, "loss": _loss(model, circuit, prompts, off) - whole}
        for layer, off in sorted(layers.items(), key=lambda item: _depth(item[0]))
    ]


def _tokens(model: SparseTransformer, node: str, names: Sequence[str]) -> str:
    """The tokens that write most to a read's channel, or whose logits a final read moves most."""
    place = place_of(node)
    if not place.endswith("read"):
        return ""
    sources, targets = neighbours(model, node, list(names))
    listed = [(name, weight) for name, weight in (targets if place == FINAL else sources) if name.startswith("token ")]
    shown = (
        (name.removeprefix("token "), f"{weight:+.2f}".replace("-", MINUS)) for name, weight in listed[:TOKENS_SHOWN]
    )
    return ", ".join(f"{token!r} {figure}" for token, figure in shown)


def _attention(
    model: SparseTransformer, circuit: Circuit, pairs: TaskPairs, names: Sequence[str]
) -> list[dict[str, Any]]:
    """The attention patterns of the heads that the circuit has nodes of, in the whole model, on both prompts."""
    found = []
    for layer, head in _heads(model, circuit)[:MAX_PATTERNS]:
        prompts = []
        for i in range(min(PATTERN_PAIRS, len(pairs))):
            real = pairs.attention_mask[i].bool()
            for which, ids in (("prompt", pairs.input_ids), ("counterfactual", pairs.counterfactual_ids)):
                row = ids[i][real]
                pattern = head_pattern(model, layer, head, row.to(model.device))
                tokens = [names[token] for token in row.tolist()]
                rounded = [[round(value, 4) for value in line] for line in pattern.tolist()]
                prompts.append({"name": f"pair {i + 1}, {which}", "tokens": tokens, "pattern": rounded})
        found.append({"layer": layer, "head": head, "prompts": prompts})
    return found


def _heads(model: SparseTransformer, circuit: Circuit) -> list[tuple[int, int]]:
    """Layer and head of the circuit's q, k and v nodes, those with most nodes first."""
    counts: dict[tuple[int, int], int] = {}
    for place, indices in circuit.nodes.items():
        if match := re.fullmatch(r"(\d+)\.attn\.[qkv]", place):
            layer = int(match[1])
            for index in indices:
                head = index // model.blocks[layer].attn.d_head
                counts[layer, head] = counts.get((layer, head), 0) + 1
    return sorted(counts, key=lambda where: (-counts[where], where))


def head_pattern(model: SparseTransformer, layer: int, head: int, ids: Int[Tensor, " seq"]) -> Float[Tensor, "seq seq"]:
    """How much each token takes of each earlier one in a head; what is missing to 1 goes to the attention sink."""
    attention = model.blocks[layer].attn
    places = [f"{layer}.attn.{name}" for name in "qk"]
    with recorded_nodes(model, places) as values:
        model(ids[None], use_cache=False)
    q, k = (attention.split_heads(values[place]) for place in places)
    return attention.weights(q, k, attention_pattern(len(ids), 0, None, ids.device))[0, head]
