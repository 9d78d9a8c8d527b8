"""Circuit: the nodes and edges that do a task, with everything that its figures are computed from again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from bridges.circuits.masks import ablated
from bridges.circuits.nodes import place_sizes
from bridges.circuits.task_loss import Calibration, Presented, accuracy, answer_differences, task_loss
from bridges.io.files import read_json, write_json, write_tensors
from bridges.io.fingerprint import fingerprint, same_model
from bridges.io.tensors import read_safetensors
from bridges.models.modes import eval_mode
from bridges.models.sparse.model import SparseTransformer
from bridges.tasks.pairs import TaskPairs

FILE, MEANS_FILE = "circuit.json", "means.safetensors"
_FIELDS = ("task", "nodes", "edges", "scale", "shift", "loss", "loss_full_model", "fingerprint", "settings", "controls")


class Edge(NamedTuple):
    """A nonzero weight between two nodes of a circuit."""

    source: str
    """As `0.attn.read.118`."""
    target: str
    weight: float


class CircuitFigures(NamedTuple):
    """How a model does a task while it runs as a circuit."""

    loss: float
    """With the circuit's scale and shift, nats; ln 2 is what guessing gives."""
    loss_unscaled: float
    """With the logits as they are."""
    accuracy: float
    """The share of prompts whose right answer is the likelier one, with the circuit's shift."""


@dataclass(frozen=True)
class Circuit:
    """The nodes that are on for a task; all others are frozen at their means over text (paper 2.2; method, section 6).

    >>> edge = Edge("0.attn.read.3", "0.attn.q.1", 0.5)
    >>> circuit = Circuit("mine", {"0.attn.read": (3,), "0.attn.q": (1,), "final.read": ()}, [edge], means={})
    >>> circuit.n_nodes, circuit.n_edges
    (2, 1)
    """

    task: str
    nodes: Mapping[str, tuple[int, ...]]
    """The indices of nodes that are on, by place as `1.attn.q`, sorted."""
    edges: list[Edge]
    """The nonzero weights of c_attn, c_proj and c_fc between them."""
    means: Mapping[str, Tensor]
    """What nodes are frozen at when they are off, by place."""
    scale: float = 1.0
    """What the difference of the two answers' logits is multiplied by."""
    shift: float = 0.0
    """What is added to it where the task's first prompt is presented, and subtracted where its second is."""
    loss: float = float("nan")
    """On the pairs that the size was chosen on, nats."""
    loss_full_model: float = float("nan")
    """Of the whole model on the same pairs, with a scale and shift of its own."""
    fingerprint: str = ""
    """Of the model."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    controls: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def n_nodes(self) -> int:
        """How many nodes are on."""
        return sum(map(len, self.nodes.values()))

    @property
    def n_edges(self) -> int:
        """How many weights join them."""
        return len(self.edges)

    def masks(self, model: SparseTransformer) -> dict[str, Bool[Tensor, " _"]]:
        """Which nodes are on, by place. ValueError if the model has other places."""
        sizes = place_sizes(model)
        if unknown := self.nodes.keys() - sizes.keys():
            raise ValueError(
                f"the circuit has nodes at {sorted(unknown)[0]}, which is no place of the model; pass its own"
            )
        found = {}
        for place, size in sizes.items():
            found[place] = torch.zeros(size, dtype=torch.bool, device=model.device)
            found[place][list(self.nodes.get(place, ()))] = True
        return found

    def apply(self, sparse: SparseTransformer) -> AbstractContextManager[None]:
        """Context in which the model runs as the circuit: every other node is frozen at its mean."""
        self.check_model(sparse)
        return ablated(sparse, self.masks(sparse), self.means)

    def ablate(self, sparse: SparseTransformer) -> AbstractContextManager[None]:
        """Context in which only the circuit's nodes are frozen at their means."""
        self.check_model(sparse)
        return ablated(sparse, {place: ~mask for place, mask in self.masks(sparse).items()}, self.means)

    @torch.no_grad()
    def evaluate(self, sparse: SparseTransformer, pairs: TaskPairs) -> CircuitFigures:
        """Loss and accuracy of the circuit on both prompts of every pair."""
        with eval_mode(sparse), self.apply(sparse):
            prompts = Presented.of(pairs, sparse.device)
            return figures(answer_differences(sparse, prompts), prompts, Calibration(self.scale, self.shift))

    def save(self, folder: str | Path) -> None:
        """Write `circuit.json` and `means.safetensors`."""
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / MEANS_FILE, {place: mean.contiguous() for place, mean in self.means.items()})
        values = {name: getattr(self, name) for name in (*_FIELDS, "versions")}
        values["nodes"] = {place: list(indices) for place, indices in self.nodes.items()}
        values["edges"] = [list(edge) for edge in self.edges]
        write_json(folder / FILE, values)

    @classmethod
    def load(cls, folder: str | Path) -> Circuit:
        """Read what `save` wrote. OSError when a file is missing; ValueError, naming it, when one is damaged."""
        folder = Path(folder).expanduser()
        values = read_json(folder / FILE)
        if missing := [name for name in (*_FIELDS, "versions") if name not in values]:
            raise ValueError(f"{folder / FILE} has no {missing[0]}; it is not a circuit, or damaged")
        values["nodes"] = {place: tuple(indices) for place, indices in values["nodes"].items()}
        values["edges"] = [Edge(*edge) for edge in values["edges"]]
        for name in ("loss", "loss_full_model"):  # JSON has no NaN
            values[name] = math.nan if values[name] is None else values[name]
        return cls(means=read_safetensors(folder / MEANS_FILE), **values)

    def __str__(self) -> str:
        places = ", ".join(f"{place} {len(indices)}" for place, indices in self.nodes.items() if indices)
        return (
            f"{self.task}: {self.n_nodes} nodes ({places}), {self.n_edges} edges; loss {self.loss:.3f} with logits "
            f"scaled by {self.scale:.2g} (whole model {self.loss_full_model:.3f})"
        )

    def check_model(self, sparse: nn.Module) -> None:
        """Raise ValueError unless this is the model that the circuit was pruned from."""
        given = fingerprint(sparse) if self.fingerprint else ""
        if self.fingerprint and not same_model(self.fingerprint, given):
            raise ValueError(
                f"the circuit belongs to another model ({self.fingerprint.split()[0]}, given {given.split()[0]}); pass "
                "the model that it was pruned from"
            )


def figures(differences: Tensor, prompts: Presented, calibration: Calibration) -> CircuitFigures:
    """The figures of logit differences on some prompts."""
    differences = differences.double()
    sign = prompts.sign.double()
    return CircuitFigures(
        task_loss(differences, sign, *calibration).item(),
        task_loss(differences, sign).item(),
        accuracy(differences, sign, calibration),
    )


@torch.no_grad()
def edges_between(model: SparseTransformer, on: Mapping[str, Bool[Tensor, " _"]]) -> list[Edge]:
    """The nonzero weights between nodes that are on, in the order of computation."""
    found: list[Edge] = []
    for layer, block in enumerate(model.blocks):
        q, k, v = block.attn.c_attn.weight.chunk(3)
        for source, target, weight in (
            ("attn.read", "attn.q", q),
            ("attn.read", "attn.k", k),
            ("attn.read", "attn.v", v),
            ("attn.v", "attn.write", block.attn.c_proj.weight),
            ("mlp.read", "mlp.neuron", block.mlp.c_fc.weight),
            ("mlp.neuron", "mlp.write", block.mlp.c_proj.weight),
        ):
            found += _edges(weight, f"{layer}.{source}", f"{layer}.{target}", on)
    return found


def _edges(weight: Tensor, source: str, target: str, on: Mapping[str, Tensor]) -> Iterator[Edge]:
    rows, columns = on[target].nonzero().squeeze(1), on[source].nonzero().squeeze(1)
    for i, j in weight[rows][:, columns].nonzero().tolist():
        row, column = int(rows[i]), int(columns[j])
        yield Edge(f"{source}.{column}", f"{target}.{row}", weight[row, column].item())
