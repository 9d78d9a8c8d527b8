"""find_channels(): which channels of the sparse model flip the dense model's answer to a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.channels.attribution import log_probability
from bridges.channels.from_circuit import circuit_channels
from bridges.channels.prompts import Channels, check_text, frozen_pair, resolve_task
from bridges.channels.reference_text import sample_text
from bridges.channels.runs import Prompts, p_target_unedited
from bridges.channels.search import BUDGET, CANDIDATES, By, ChannelSet, Search, SearchOptions, smallest_sufficient
from bridges.circuits.circuit import Circuit
from bridges.io.progress import announce
from bridges.models.residual import ResidualModel
from bridges.objective.pair import ModelPair
from bridges.steering.delta import EntryPoint
from bridges.tasks.pairs import TaskPairs

CHOSEN_ON = 64
"""Pairs of a task that channels are chosen on; what is reported of them comes from other pairs."""


class RankedChannel(NamedTuple):
    """One channel's counterfactual edit at strength 1: its predicted and its measured effect."""

    site: str
    channel: int
    at: EntryPoint
    predicted: float
    """First-order change of the dense model's mean log P(target), nats."""
    effect: float
    """The change that the edit makes, nats."""
    p_target: float
    """The dense model's mean P(target) under the edit."""


class FoundChannels(NamedTuple):
    """The result of `find_channels`, on the prompts that it chose on."""

    task: str
    ranking: list[RankedChannel]
    """Every single channel whose edit was made, largest P(target) first."""
    agreement: float
    """Spearman's rank correlation of predicted and measured effects over the ranking."""
    sets: list[ChannelSet]
    """Sets of 1, 2, ... channels at one site, each grown from the one before; the last is `best`."""
    circuit_nodes: tuple[tuple[str, ...], ...] | None = None
    """For each channel of `best` the nodes of the circuit that read or write it, none where it is no node of the
    circuit; None if the search was given no circuit."""

    @property
    def best(self) -> Channels:
        """The smallest set whose margin over random directions comes near the largest margin."""
        return self.sets[-1].channels

    @property
    def in_circuit(self) -> tuple[bool, ...] | None:
        """For each channel of `best` whether it is a node of the circuit; None if the search was given no circuit."""
        return None if self.circuit_nodes is None else tuple(map(bool, self.circuit_nodes))


def find_channels(
    dense: nn.Module | ResidualModel | str | Path,
    sparse: nn.Module | ResidualModel | str | Path,
    bridge_set: BridgeSet,
    task: str | TaskPairs,
    n: int = CHOSEN_ON,
    *,
    most: int = 1,
    by: By = "dense",
    budget: float = BUDGET,
    candidates: int = CANDIDATES,
    circuit: Circuit | None = None,
    text: Int[Tensor, "rows seq"] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    check_models: bool = True,
    progress: bool = True,
) -> FoundChannels:
    """Find the channels whose counterfactual edit flips the dense model's answer to a task (paper A.4).

    `dense`, `sparse`: model objects, `ResidualModel`s, folders or hub ids. `task`: one of `TASKS`, of which `n` pairs
    are made with `tokenizer` (None: the one saved with the dense model), or `TaskPairs`.

    One backward pass predicts the effect of every channel at every site, at the read and at the residual. The
    `candidates` of largest prediction at each are then edited; with more than ten such places, ten times `candidates`
    in total: half by prediction, the others spread over all places. Sets grow greedily to at most `most` channels at
    one site: by the dense model's P(target), or with `by="both"` by the geometric mean of both models', which finds
    channels that the sparse model itself decides by. The result is the smallest set that does nearly as much, beyond
    random directions of its norm, as the best. Only sets count that raise P(target) and whose ablation costs the dense
    model at most `budget` nats per token on `text` [rows, seq], token ids that have nothing to do with the task (None:
    sampled from the dense model). Measure the result on other prompts and text, as `sweep` does. Memory does not grow
    with the number of pairs or rows. `progress=False` silences the bars on standard error.

    With the task's `circuit` in the sparse model (`prune`) channels are looked for among its nodes first: the channels
    that its reads and writes are of are candidates at their site, ahead of the `candidates` by prediction and on top of
    them, and `in_circuit` of the result says which of the chosen channels are nodes.

    Raises ValueError if an argument is out of range, the bridges are of other models, the circuit is of another model
    or task, or no set keeps within the budget.

    >>> import bridges, torch
    >>> pair = bridges.load_pair()
    >>> rows = torch.randint(1024, (64, 32), generator=torch.Generator().manual_seed(0))
    >>> bridge_set = bridges.fit(pair.dense, pair.sparse, rows, steps=0, ridge=0.1, sites=("0.mlp",), progress=False)
    >>> options = {"n": 8, "text": rows[:4], "tokenizer": pair.tokenizer, "budget": 1.0}
    >>> found = bridges.find_channels(pair.dense, pair.sparse, bridge_set, "for_while", **options)
    >>> found.best.site, len(found.best.channels), len(found.ranking)
    ('0.mlp', 1, 32)
    """
    options = SearchOptions(most, by, budget, candidates).checked()
    with frozen_pair(dense, sparse, bridge_set, check_models) as pair:
        prompts = Prompts(pair, resolve_task(task, dense, tokenizer, n, seed))
        nodes = None if circuit is None else circuit_channels(circuit, pair, prompts.pairs.task, check_models)
        rows = sample_text(pair, seed, sources=(dense, sparse)) if text is None else check_text(pair, text)
        return find(pair, prompts, rows, options, progress, nodes)


@torch.no_grad()
def find(
    pair: ModelPair,
    prompts: Prompts,
    text: Int[Tensor, "rows seq"],
    options: SearchOptions = SearchOptions(),  # noqa: B008, an immutable tuple
    progress: bool = False,
    circuit_nodes: Mapping[tuple[str, int], tuple[str, ...]] | None = None,
) -> FoundChannels:
    """`find_channels` on prompts and text that are checked, and a circuit as `circuit_channels` returns it."""
    return find_sizes(pair, prompts, text, options, progress, circuit_nodes, single=(False,))[0]


@torch.no_grad()
def find_sizes(
    pair: ModelPair,
    prompts: Prompts,
    text: Int[Tensor, "rows seq"],
    options: SearchOptions,
    progress: bool = False,
    circuit_nodes: Mapping[tuple[str, int], tuple[str, ...]] | None = None,
    single: Sequence[bool] = (True, False),
) -> list[FoundChannels]:
    """`find` for one channel alone (where `single`) and for up to `options.most`, which share their edits."""
    from scipy.stats import spearmanr

    n_sites, n = len(pair.bridge_set), len(prompts)
    announce(
        f"find_channels, {prompts.pairs.task}: {n} pairs, {n_sites} sites, {text.numel()} tokens of text", progress
    )
    search = Search(pair, prompts, text, options, progress, circuit_nodes or ())
    ranking = _rank_single_channels(search)
    agreement: Any = spearmanr([one.predicted for one in ranking], [one.effect for one in ranking])[0]
    found = []
    for alone in single:
        sets = smallest_sufficient(search.find_sets(alone), options.by)
        nodes = None
        if circuit_nodes is not None:
            best = sets[-1].channels
            nodes = tuple(circuit_nodes.get((best.site, channel), ()) for channel in best.channels)
        found.append(FoundChannels(prompts.pairs.task, ranking, float(agreement), sets, nodes))
    return found


def _rank_single_channels(search: Search) -> list[RankedChannel]:
    """Edit the channels of largest predicted effect one by one; largest P(target) of the dense model first."""
    unedited = log_probability(p_target_unedited(search.pair, search.prompts)).mean()
    edits = search.dense_edits()
    search.run_edits([chosen for chosen, _ in edits], f"{len(edits)} edits of one channel", "dense")
    ranking = []
    for chosen, predicted in edits:
        p = search.p_target_per_prompt(chosen)
        effect = (log_probability(p).mean() - unedited).item()
        ranking.append(RankedChannel(chosen.site, chosen.channels[0], chosen.at, predicted, effect, p.mean().item()))
    return sorted(ranking, key=lambda one: one.p_target, reverse=True)
