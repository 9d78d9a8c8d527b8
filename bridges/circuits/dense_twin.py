"""Control (k) of a circuit: its size in a model of the same class with dense weights, by masks and by attribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bridges.circuits.circuit import Circuit
from bridges.circuits.nodes import node_means
from bridges.circuits.search import Search, found_size, search_result
from bridges.circuits.settings import PruneConfig
from bridges.io.progress import Bar
from bridges.models.loading import ModelSource, as_residual, find_tokenizer
from bridges.models.sparse.model import SparseTransformer
from bridges.models.tokens import Batch
from bridges.sparsity.projection import density
from bridges.tasks.pairs import TaskPairs

METHODS = ("masks", "attribution")
SMALL = 0.8
"""A control's circuit of which this share is no more than the circuit does as well."""


def load_dense_twin(source: ModelSource, model: ModelSource, tokenizer: Any) -> SparseTransformer:
    """The model that `source` is or holds.

    Raises ValueError unless it is another `SparseTransformer` with the tokens of `model`; its tokenizer is compared
    with `tokenizer` where one is saved with it.
    """
    twin = as_residual(source).model
    if not isinstance(twin, SparseTransformer):
        raise ValueError(
            f"dense_twin={type(twin).__name__} must be a SparseTransformer with dense weights: nodes of another class "
            "are not comparable; bridges.pretrain with support='projected' and target_density=1 trains one"
        )
    own = as_residual(model)
    if twin is own.model:
        raise ValueError(
            "dense_twin is the model that the circuit was pruned from; pass one trained with dense weights"
        )
    sizes, saved = (twin.config.vocab_size, own.vocab_size), find_tokenizer(source)
    other_words = tokenizer is not None and saved is not None and saved.get_vocab() != tokenizer.get_vocab()
    if sizes[0] != sizes[1] or other_words:
        raise ValueError(
            f"dense_twin has other tokens than the model ({sizes[0]} and {sizes[1]} of them); pass one that was "
            "trained with the same tokenizer"
        )
    return twin


def same_class_sizes(
    model: SparseTransformer,
    twin: SparseTransformer,
    means: Mapping[str, Tensor],
    pairs: TaskPairs,
    config: PruneConfig,
    text: Sequence[Batch],
    bar: Bar,
) -> dict[str, Any]:
    """(k) The sizes of circuits for the same pairs in the dense twin, and by attribution in the model itself.

    Args:
        model: whose circuit is controlled, with `means` of its nodes.
        twin: the model with dense weights.
        means: of the nodes of `model`, by place.
        pairs: of the task.
        config: the settings of the circuit; the method is replaced.
        text: token batches that the twin's means are taken over, and on which both models' losses are measured.
        bar: moved by every search.

    Returns:
        `attribution`: nodes, edges and loss of the model's own circuit by attribution. `dense_twin`: the same under
        `masks` and `attribution`; `density` of the twin; and `text_ce` and `text_ce_own`, cross-entropy on the text in
        nats per token, without which the sizes could not be compared.
    """
    twin_means = node_means(twin, text)

    def size(one: SparseTransformer, own_means: Mapping[str, Tensor], method: str) -> dict[str, Any]:
        settings = config.with_settings({"method": method, "seeds": 1})
        return found_size(search_result(lambda: Search(one, pairs, own_means, settings).run(0, bar)))

    in_twin: dict[str, Any] = {method: size(twin, twin_means, method) for method in METHODS}
    in_twin |= {"density": density(twin), "text_ce": text_ce(twin, text), "text_ce_own": text_ce(model, text)}
    return {"attribution": size(model, means, "attribution"), "dense_twin": in_twin}


@torch.no_grad()
def text_ce(model: SparseTransformer, text: Sequence[Batch]) -> float:
    """Cross-entropy of the next token on unpadded rows, nats per token."""
    total, tokens = 0.0, 0
    for input_ids, _ in text:
        ids = input_ids.to(model.device)
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()
        tokens += ids[:, 1:].numel()
    return total / tokens


def as_small(size: int, own: int) -> bool:
    """Whether a control's circuit is about as small as the circuit, or smaller.

    >>> as_small(50, 40), as_small(51, 40)
    (True, False)
    """
    return size * SMALL <= own


def twin_verdict(circuit: Circuit, found: Mapping[str, Any]) -> list[str]:
    """In words, where the dense twin's circuit has as few nodes, or as few edges, as the circuit."""
    lines = []
    for method in METHODS:
        size = found.get("dense_twin", {}).get(method, {"nodes": None})
        if size["nodes"] is None:
            continue
        own = {"nodes": circuit.n_nodes, "edges": circuit.n_edges}
        if few := [what for what in own if as_small(size[what], own[what])]:
            lines.append(
                f"dense twin: by {method} a circuit of {size['nodes']} nodes and {size['edges']} edges does the task "
                f"in the model with dense weights, as few {' and '.join(few)} as here ({own['nodes']} nodes and "
                f"{own['edges']} edges)"
            )
    return lines
