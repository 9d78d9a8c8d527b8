"""circuit_to_dense(): what the nodes of a circuit are, and do, in the dense model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.channels.prompts import Channels, frozen_pair, resolve_tokenizer
from bridges.channels.runs import Prompts, p_target_under_edits, p_target_under_random, p_target_unedited
from bridges.circuits.circuit import Circuit
from bridges.circuits.nodes import FINAL, Node
from bridges.models.residual import ResidualModel
from bridges.objective.pair import SIDES, ModelPair
from bridges.tasks.pairs import TaskPairs, task_pairs

N_PAIRS = 64
N_RANDOM = 8


class StreamChannel(NamedTuple):
    """A channel of the sparse model's residual stream at a site, and the nodes of a circuit that read or write it."""

    site: str
    channel: int
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class DenseEffect:
    """What the counterfactual edit of some channels of one site does to both models, mean over prompts."""

    site: str
    channels: tuple[int, ...]
    nodes: tuple[str, ...]
    p_target: float
    """Of the dense model, with the edit pushed through the decoder into its stream."""
    p_target_sparse: float
    """Of the sparse model, edited at the same channels."""
    p_target_random: float
    """Of the dense model under random directions of the edit's norm."""


@dataclass(frozen=True)
class CircuitInDense:
    """A circuit's residual nodes in the dense model."""

    task: str
    p_target_unedited: float
    p_target_sparse_unedited: float
    nodes: list[DenseEffect]
    """Each channel by itself, in the order of the sites."""
    together: list[DenseEffect]
    """All of the circuit's channels of a site at once."""
    directions: Mapping[str, Float[Tensor, " d_dense"]]
    """Per `SITE.CHANNEL` the decoder's column: the channel's direction in the dense model's stream."""
    skipped: list[str]
    """Nodes without a bridge: at sites that are not bridged, or position channels."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the directions."""
        values = {name: getattr(self, name) for name in ("task", "p_target_unedited", "p_target_sparse_unedited")}
        values |= {name: [asdict(one) for one in getattr(self, name)] for name in ("nodes", "together")}
        return {**values, "skipped": self.skipped}

    def __str__(self) -> str:
        before = f"{self.p_target_unedited:.3f} dense, {self.p_target_sparse_unedited:.3f} sparse"
        lines = [f"{self.task}: P(target) unedited {before}", "site      channels            dense   sparse  random"]
        # Of a site with one channel, all of them together are that one.
        several = [effect for effect in self.together if len(effect.channels) > 1]
        for effect in (*self.nodes, *several):
            channels = ",".join(map(str, effect.channels))
            figures = f"{effect.p_target:.3f}   {effect.p_target_sparse:.3f}   {effect.p_target_random:.3f}"
            lines.append(f"{effect.site:<9} {channels:<19} {figures}")
        return "\n".join(lines)


def circuit_to_dense(
    dense: nn.Module | ResidualModel | str | Path,
    sparse: nn.Module | ResidualModel | str | Path,
    bridge_set: BridgeSet,
    circuit: Circuit,
    pairs: TaskPairs | None = None,
    *,
    tokenizer: Any = None,
    seed: int = 1,
    check_models: bool = True,
) -> CircuitInDense:
    """Take a circuit's residual nodes through the bridges: each one's direction and effect, and all of a site together.

    A read is a channel of the stream at its own site, a write one at the next site. Edits are counterfactual, at the
    residual, at strength 1 (paper A.4).

    Args:
        dense: the dense model.
        sparse: the sparse model that the circuit was pruned from.
        bridge_set: the bridges between them.
        circuit: as `prune` finds it.
        pairs: prompts to measure on; by default 64 of the circuit's task by another seed than it was pruned on.
        tokenizer: makes these prompts; by default the one saved with the dense model.
        seed: of prompts and random directions.
        check_models: whether to refuse models that the bridges were not fitted to.

    Raises ValueError if the circuit has no residual node at a bridged site.

    >>> import bridges
    >>> pair = bridges.load_pair()
    >>> rows = torch.randint(1024, (64, 16), generator=torch.Generator().manual_seed(0))
    >>> bridge_set = bridges.fit(pair.dense, pair.sparse, rows, steps=0, ridge=0.1, sites=("0.mlp",), progress=False)
    >>> circuit = Circuit("for_while", {"0.mlp.read": (5,), "0.mlp.neuron": (7,)}, [], {})
    >>> pairs = task_pairs("for_while", pair.tokenizer, 8)
    >>> found = circuit_to_dense(pair.dense, pair.sparse, bridge_set, circuit, pairs)
    >>> [(effect.site, effect.channels, effect.nodes) for effect in found.nodes]
    [('0.mlp', (5,), ('0.mlp.read.5',))]
    """
    if pairs is None:
        pairs = task_pairs(circuit.task, resolve_tokenizer(dense, tokenizer), N_PAIRS, seed)
    with frozen_pair(dense, sparse, bridge_set, check_models) as pair, torch.no_grad():
        found, skipped = _bridged_channels(circuit, pair)
        prompts = Prompts(pair, pairs)
        sites = list(dict.fromkeys(one.site for one in found))
        alone = [Channels(one.site, (one.channel,), "residual") for one in found]
        together = [Channels(s, tuple(one.channel for one in found if one.site == s), "residual") for s in sites]
        nodes = [one.nodes for one in found]
        nodes += [tuple(name for one in found if one.site == site for name in one.nodes) for site in sites]
        effects = _effects(pair, prompts, [*alone, *together], nodes, seed)
        before, before_sparse = (p_target_unedited(pair, prompts, side).mean().item() for side in SIDES)
        directions = {
            f"{one.site}.{one.channel}": pair.bridge_set[one.site].decoder_weight[:, one.channel].clone()
            for one in found
        }
    return CircuitInDense(
        circuit.task, before, before_sparse, effects[: len(found)], effects[len(found) :], directions, skipped
    )


def _effects(
    pair: ModelPair, prompts: Prompts, edits: list[Channels], nodes: list[tuple[str, ...]], seed: int
) -> list[DenseEffect]:
    dense, sparse = (p_target_under_edits(pair, prompts, edits, side).mean(1).tolist() for side in SIDES)
    random = [p_target_under_random(pair, prompts, one, N_RANDOM, seed).mean().item() for one in edits]
    return [
        DenseEffect(edit.site, edit.channels, nodes[i], dense[i], sparse[i], random[i]) for i, edit in enumerate(edits)
    ]


def circuit_channels(
    circuit: Circuit, pair: ModelPair, task: str, check_model: bool = True
) -> dict[tuple[str, int], tuple[str, ...]]:
    """The stream channels of a circuit's nodes at bridged sites, as (site, channel), with the names of these nodes.

    Raises ValueError if the circuit is of another task, of another model (unless `check_model` is False), or has no
    read or write at a bridged site.
    """
    if not isinstance(circuit, Circuit):
        raise ValueError(f"circuit={circuit!r} must be a bridges.Circuit, as prune and Circuit.load return it")
    if circuit.task != task:
        raise ValueError(f"circuit is of the task {circuit.task!r}, not of task={task!r}; pass the circuit of that")
    if check_model:
        circuit.check_model(pair.sparse.model)
    return {(one.site, one.channel): one.nodes for one in _bridged_channels(circuit, pair)[0]}


def _bridged_channels(circuit: Circuit, pair: ModelPair) -> tuple[list[StreamChannel], list[str]]:
    found, skipped = stream_channels(circuit, pair.bridge_set.sites, pair.sparse.d_model)
    if not found:
        raise ValueError(
            f"the circuit of {circuit.task!r} has no read or write at a bridged site, which are "
            f"{', '.join(pair.bridge_set.sites)}"
        )
    return found, skipped


def stream_channels(circuit: Circuit, sites: list[str], d_model: int) -> tuple[list[StreamChannel], list[str]]:
    """The stream channels that the circuit's reads and writes are of, in the order of `sites`, and nodes at no site."""
    nodes: dict[tuple[str, int], list[str]] = {}
    skipped = []
    n_layers = 1 + max((int(place.split(".")[0]) for place in circuit.nodes if place != FINAL), default=0)
    for place, indices in circuit.nodes.items():
        site = stream_site(place, n_layers)
        for index in indices if site is not None else ():
            name = str(Node(place, index))
            if site in sites and index < d_model:
                nodes.setdefault((site, index), []).append(name)
            else:
                skipped.append(name)
    order = sorted(nodes, key=lambda key: (sites.index(key[0]), key[1]))
    return [StreamChannel(site, channel, tuple(nodes[site, channel])) for site, channel in order], skipped


def stream_site(place: str, n_layers: int) -> str | None:
    """The site whose stream a place reads, or the one after what it writes; None for q, k, v and neurons.

    >>> stream_site("0.attn.read", 2), stream_site("0.mlp.write", 2), stream_site("1.mlp.write", 2)
    ('0.attn', '1.attn', 'final')
    """
    if place == FINAL:
        return "final"
    layer, module, kind = place.split(".")
    if kind == "read":
        return f"{layer}.{module}"
    if kind != "write":
        return None
    if module == "attn":
        return f"{layer}.mlp"
    return "final" if int(layer) == n_layers - 1 else f"{int(layer) + 1}.attn"
