"""A circuit on one pair of prompts: what its nodes are in both, and at which token each of them counts."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.circuits.circuit import Circuit
from bridges.circuits.nodes import place_sizes, replaced_nodes
from bridges.circuits.task_loss import Presented
from bridges.models.modes import frozen
from bridges.models.sparse.model import SparseTransformer
from bridges.tasks.pairs import TaskPairs, task_pairs
from bridges.tasks.token_sets import TokenSets


class CircuitNode(NamedTuple):
    """A node of the circuit at the token where it counts most."""

    place: str
    layer: int
    """The number of its place in the order of computation: the row it is drawn in."""
    index: int
    position: int
    activation: float
    """Its value there in the original prompt."""
    change: float
    """That value minus its value in the other prompt."""

    @property
    def name(self) -> str:
        """As `1.attn.read.118`."""
        return f"{self.place}.{self.index}"


class Answer(NamedTuple):
    """One of the two answers."""

    token: int
    """Of several tokens, the one with the largest logit in the original prompt."""
    probability: float
    """Of this answer rather than the other, with the circuit's scale and shift."""


class CircuitRun(NamedTuple):
    """What the circuit does on one pair."""

    input_ids: list[int]
    """Of the original prompt."""
    other_ids: list[int]
    """Of the counterfactual one."""
    nodes: list[CircuitNode]
    """In the order of computation."""
    answers: tuple[Answer, Answer]
    """The right one of the original prompt, then the other."""


def one_pair(circuit: Circuit, tokenizer: Any, pairs: TaskPairs | None, row: int) -> TaskPairs:
    """One pair without padding, of `pairs` or else of the circuit's task."""
    if row < 0 or (pairs is not None and row >= len(pairs)):
        given = "" if pairs is None else f" and below {len(pairs)}, the number of pairs"
        raise ValueError(f"row={row} must be at least 0{given}")
    if pairs is None:
        if tokenizer is None:
            raise ValueError(
                f"tokenizer=None: prompts of the task {circuit.task!r} need one; pass tokenizer= or pairs="
            )
        pairs = task_pairs(circuit.task, tokenizer, row + 1)
    padding = int((1 - pairs.attention_mask[row]).sum())
    return pairs.take(torch.tensor([row]), first_token=padding)


@torch.enable_grad()
def run_pair(circuit: Circuit, model: SparseTransformer, pair: TaskPairs) -> CircuitRun:
    """Run the model as the circuit on both prompts of a pair.

    A node counts by the change of the answers' logit difference, to first order, when its value at a token becomes
    that of the other prompt; the gradient is the mean of those in both prompts, since AbsTopK blocks it where it drops
    a later node. Where no gradient arrives, the token counts where the prompts change the node most, and where they
    change it nowhere, the last one. ValueError if the circuit has no nodes or belongs to another model.
    """
    places = [place for place in place_sizes(model) if circuit.nodes.get(place)]
    if not places:
        raise ValueError(f"the circuit of {circuit.task!r} has no nodes; there is nothing to draw")
    values: dict[str, Tensor] = {}
    shifts: dict[str, Tensor] = {}

    def record(x: Tensor, place: str) -> Tensor:
        values[place], shifts[place] = x.detach(), torch.zeros_like(x).requires_grad_()
        return x + shifts[place]

    prompts = Presented.of(pair, model.device)
    recorders = {place: partial(record, place=place) for place in places}
    with frozen(model), circuit.apply(model), replaced_nodes(model, recorders):
        # All logits: with the last alone, the unembedding's reads would be recorded at the last token alone.
        logits = model(prompts.input_ids, use_cache=False).logits[:, -1]
        differences = prompts.right.logsumexp(logits) - prompts.other.logsumexp(logits)
        # The right answer of the second prompt is the other one of the first.
        gradients = torch.autograd.grad(differences[0] - differences[1], [shifts[place] for place in places])
    nodes = []
    for place, gradient in zip(places, gradients, strict=True):
        layer = list(place_sizes(model)).index(place)
        for index in circuit.nodes[place]:
            original, other = values[place][:, :, index]
            change = original - other
            position = _position(gradient[:, :, index].mean(0), change)
            nodes.append(CircuitNode(place, layer, index, position, original[position].item(), change[position].item()))
    scaled = circuit.scale * differences[0].item() + circuit.shift * prompts.sign[0].item()
    right = torch.tensor(scaled, dtype=torch.float64).sigmoid().item()
    answers = Answer(_likeliest(prompts.right, logits), right), Answer(_likeliest(prompts.other, logits), 1 - right)
    return CircuitRun(pair.input_ids[0].tolist(), pair.counterfactual_ids[0].tolist(), nodes, answers)


def _position(gradient: Float[Tensor, " seq"], change: Float[Tensor, " seq"]) -> int:
    """The first of the tokens where a node counts most."""
    for score in ((gradient * change).abs(), change.abs()):
        if score.any():
            return int((score == score.max()).nonzero()[0])
    return len(change) - 1


def _likeliest(answers: TokenSets, logits: Float[Tensor, "2 vocab"]) -> int:
    """The token of the first prompt's set that has the largest logit there."""
    tokens = answers.filled()[0]
    tokens = tokens[tokens >= 0]
    return int(tokens[logits[0, tokens].argmax()])
