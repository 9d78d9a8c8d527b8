"""A circuit as an attribution graph in the JSON format of Neuronpedia and circuit-tracer (docs/interop.md)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from bridges.circuits.circuit import Circuit
from bridges.circuits.features import sparse_transformer
from bridges.circuits.nodes import FINAL, place_sizes
from bridges.interop.circuit_run import CircuitNode, CircuitRun, one_pair, run_pair
from bridges.io.files import write_json
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.tasks.pairs import TaskPairs

SCHEMA_VERSION = 1
"""Of circuit-tracer: a feature's number is the Cantor pairing of its layer and index."""
_SHOWN = {"\n": "⏎", "\t": "→", "\r": "↵"}
"""How circuit-tracer shows characters that would break a label."""


def export_graph(
    circuit: Circuit,
    sparse: nn.Module | ResidualModel | str | Path,
    path: str | Path,
    *,
    tokenizer: Any = None,
    pairs: TaskPairs | None = None,
    row: int = 0,
    slug: str | None = None,
    scan: str | None = None,
) -> None:
    """Write a circuit on one prompt as an attribution graph, which Neuronpedia and circuit-tracer draw.

    The model runs as the circuit on both prompts of a pair. Each node stands at one token: where giving it its value
    in the other prompt would change the answers' logit difference most, to first order. A link's weight is what its
    source adds to its target, minus what it adds in the other prompt: the model's weight times the change of the
    source's value. What else is in the file: docs/interop.md.

    Args:
        circuit: the circuit.
        sparse: the model that it was pruned from; ValueError for another.
        path: the JSON file; `~` is expanded.
        tokenizer: the model's, for the text of tokens; without one they are numbers in brackets.
        pairs: what the prompts are taken from; by default pairs of the circuit's task, which need a tokenizer.
        row: the pair whose original prompt is drawn; ValueError if there is none.
        slug: the graph's name in Neuronpedia; by default the task's, with hyphens.
        scan: the model's name in Neuronpedia; by default its `model_type`.

    >>> import bridges, tempfile
    >>> from bridges.demo import demo_circuit
    >>> from bridges.io.files import read_json
    >>> pair = bridges.load_pair()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_graph(demo_circuit(pair), pair.sparse, f"{folder}/graph.json", tokenizer=pair.tokenizer)
    ...     graph = read_json(f"{folder}/graph.json")
    >>> [node["clerp"] for node in graph["nodes"] if node["feature_type"] == "logit"]
    ['Output "\\')" (p=1.000)', 'Output "”)" (p=0.000)']
    """
    model = sparse_transformer(sparse)
    run = run_pair(circuit, model, one_pair(circuit, tokenizer, pairs, row))
    links = [*_edge_links(circuit, run), *_stream_links(model, run), *_logit_links(model, run)]
    links = [link for link in links if link["weight"] != 0]  # the viewer divides by the sum of a node's links
    names = [_token(tokenizer, token) for token in run.input_ids]
    nodes = [_feature(node) for node in run.nodes] + _embeddings(run, names) + _logits(model, run, tokenizer)
    linked = {end for link in links for end in (link["source"], link["target"])}
    pinned = [node["node_id"] for node in nodes if node["feature_type"] != "embedding" or node["node_id"] in linked]
    metadata = {
        "slug": circuit.task.replace("_", "-") if slug is None else slug,
        "scan": model.config.model_type if scan is None else scan,
        "transcoder_list": [],  # circuit-tracer's reader asks for it
        "prompt_tokens": [_shown(name) for name in names],
        "prompt": "".join(names) if tokenizer is None else tokenizer.decode(run.input_ids),
        "schema_version": SCHEMA_VERSION,
        "info": _info(circuit, run),
        "pruning_settings": dict(circuit.settings),
    }
    # The viewer's subgraph shows what is pinned when it opens.
    state = {"pinnedIds": pinned, "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    write_json(path, {"metadata": metadata, "qParams": state, "nodes": nodes, "links": links})


def _edge_links(circuit: Circuit, run: CircuitRun) -> Iterator[dict[str, Any]]:
    """The circuit's own edges."""
    by_name = {node.name: node for node in run.nodes}
    for source, target, weight in circuit.edges:
        yield _link(_node_id(by_name[source]), _node_id(by_name[target]), weight * by_name[source].change)


def _stream_links(model: SparseTransformer, run: CircuitRun) -> Iterator[dict[str, Any]]:
    """What reads take from the stream: the embedding of the token where they stand, and what earlier nodes write."""
    embedding = model.transformer.wte.weight
    for read in run.nodes:
        if not read.place.endswith("read") or read.index >= model.config.d_model:  # the others are positions' channels
            continue
        token, other = run.input_ids[read.position], run.other_ids[read.position]
        change = (embedding[token, read.index] - embedding[other, read.index]).item()
        yield _link(_embedding_id(run, read.position), _node_id(read), change)
        for write in run.nodes:
            if write.place.endswith("write") and write.index == read.index and write.layer < read.layer:
                yield _link(_node_id(write), _node_id(read), write.change)


def _logit_links(model: SparseTransformer, run: CircuitRun) -> Iterator[dict[str, Any]]:
    """What the unembedding, and the bigram table where there is one, add to the answers' logits."""
    table, last = model.bigram_table, len(run.input_ids) - 1
    for answer in run.answers:
        logit = _logit_id(model, run, answer.token)
        for node in run.nodes:
            if node.place == FINAL:
                yield _link(_node_id(node), logit, model.lm_head.weight[answer.token, node.index].item() * node.change)
        if table is not None:
            change = table[run.input_ids[last], answer.token] - table[run.other_ids[last], answer.token]
            yield _link(_embedding_id(run, last), logit, change.item())


def _link(source: str, target: str, weight: float) -> dict[str, Any]:
    return {"source": source, "target": target, "weight": weight}


def _node_id(node: CircuitNode) -> str:
    return f"{node.layer}_{node.index}_{node.position}"


def _embedding_id(run: CircuitRun, position: int) -> str:
    return f"E_{run.input_ids[position]}_{position}"


def _logit_id(model: SparseTransformer, run: CircuitRun, token: int) -> str:
    return f"{len(place_sizes(model))}_{token}_{len(run.input_ids) - 1}"


def _feature(node: CircuitNode) -> dict[str, Any]:
    """A node of the circuit; the format's word for any feature is `cross layer transcoder`."""
    both = node.layer + node.index
    return {
        "node_id": _node_id(node),
        "feature": both * (both + 1) // 2 + node.index,  # the Cantor pairing
        "layer": str(node.layer),
        "ctx_idx": node.position,
        "feature_type": "cross layer transcoder",
        "jsNodeId": f"{node.layer}_{node.index}-0",
        "clerp": node.name,
        "influence": None,
        "activation": node.activation,
    }


def _embeddings(run: CircuitRun, names: list[str]) -> list[dict[str, Any]]:
    """One node for every token of the prompt."""
    return [
        {
            "node_id": _embedding_id(run, position),
            "feature": position,
            "layer": "E",
            "ctx_idx": position,
            "feature_type": "embedding",
            "jsNodeId": f"E_{token}-{position}",
            "clerp": f'Emb: "{_shown(names[position])}"',
        }
        for position, token in enumerate(run.input_ids)
    ]


def _logits(model: SparseTransformer, run: CircuitRun, tokenizer: Any) -> list[dict[str, Any]]:
    """One node for each answer, the right one first."""
    last = len(run.input_ids) - 1
    return [
        {
            "node_id": _logit_id(model, run, answer.token),
            "feature": answer.token,
            "layer": str(len(place_sizes(model))),
            "ctx_idx": last,
            "feature_type": "logit",
            "token_prob": answer.probability,
            "is_target_logit": i == 0,
            "jsNodeId": f"L_{answer.token}-{last}",
            # The viewers read the token, up to the second straight quote, and the probability out of this text.
            "clerp": f'Output "{_quotable(_token(tokenizer, answer.token))}" (p={answer.probability:.3f})',
        }
        for i, answer in enumerate(run.answers)
    ]


def _info(circuit: Circuit, run: CircuitRun) -> dict[str, Any]:
    rows = dict.fromkeys(f"{node.layer} {node.place}" for node in run.nodes)
    return {
        "description": f"{circuit}. Layers of the graph: {', '.join(rows)}.",
        "generator": {"name": "sparse-bridges", "version": version("sparse-bridges")},
    }


def _token(tokenizer: Any, token: int) -> str:
    return f"[{token}]" if tokenizer is None else tokenizer.decode([token])


def _quotable(token: str) -> str:
    return _shown(token).replace('"', "”")


def _shown(text: str) -> str:
    for character, shown in _SHOWN.items():
        text = text.replace(character, shown)
    return text
