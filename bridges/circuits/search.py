"""The search for one task's circuit: a ranking of nodes, a bisection of the size, and dropping those not needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.circuits.attribution import attributions
from bridges.circuits.circuit import Circuit, edges_between
from bridges.circuits.live import MaskedPass
from bridges.circuits.masks import Masks
from bridges.circuits.paths import on_paths
from bridges.circuits.prefixes import Prefixes
from bridges.circuits.reduction import reduced
from bridges.circuits.settings import PruneConfig
from bridges.circuits.task_loss import MAX_SCALE, Calibration, Presented, calibrate, task_loss
from bridges.io.progress import Bar
from bridges.models.sparse.model import SparseTransformer
from bridges.tasks.pairs import TaskPairs

On = dict[str, Bool[Tensor, " _"]]
CALIBRATION_PAIRS = 32
"""Training pairs that the scale and the shift of a circuit's logits are fitted on."""
TRIALS = 300
"""Smaller circuits that are tried at most once the size is bisected: each costs a pass over the prompts."""


class TargetNotReached(ValueError):
    """No circuit has a task loss as small as asked for; `loss` is the best one reached."""

    def __init__(self, message: str, loss: float):
        super().__init__(message)
        self.loss = loss


class Judged(NamedTuple):
    """A set of nodes with the loss that it has."""

    on: On
    loss: float
    calibration: Calibration


class Ranking(NamedTuple):
    """The order in which a circuit takes nodes: those of the largest scores first."""

    scores: Mapping[str, Float[Tensor, " _"]]
    """By place; minus infinity where a node stays off."""
    first_try: int
    """How many nodes the bisection begins with."""


class Search:
    """The search for one task's circuit in one model, whose nodes that are `forbidden` stay off.

    `means` are what nodes that are off are frozen at. The last of the pairs choose the size, all where no part is set
    aside for it.
    """

    def __init__(
        self,
        model: SparseTransformer,
        pairs: TaskPairs,
        means: Mapping[str, Tensor],
        config: PruneConfig,
        forbidden: Mapping[str, Bool[Tensor, " _"]] | None = None,
    ):
        n = len(pairs.input_ids)
        if n < 4:
            raise ValueError(
                f"task {pairs.task!r} has {n} pairs; pruning needs at least 4, one in four to choose the size"
            )
        self.model, self.config, self.task = model, config, pairs.task
        self.masked_pass = MaskedPass(model)
        self.means = {place: mean.to(model.device) for place, mean in means.items()}
        n_judge = max(1, int(config.judge_share * n)) if config.judge_share else 0
        self.prompts = Presented.of(pairs, model.device)
        self.prefixes = Prefixes.of(self.prompts.input_ids, self.prompts.attention_mask)
        pair = torch.arange(n, device=model.device)
        self.train = pair[: n - n_judge]
        self.judge = pair[n - n_judge :] if n_judge else pair
        self.calibration = self.train[:CALIBRATION_PAIRS]
        self.tokens = torch.cat([pairs.input_ids, pairs.counterfactual_ids]).unique().tolist()
        answers = torch.cat([sets.distinct.flatten() for sets in (pairs.answer_sets, pairs.target_sets)]).unique()
        self.answers = answers[answers >= 0].tolist()
        allowed = None if forbidden is None else {place: ~mask for place, mask in forbidden.items()}
        self.paths = on_paths(model, self.tokens, self.answers, allowed)

    def run(self, seed: int, bar: Bar) -> Circuit:
        """One search; with masks these are its own, by attribution every seed gives the same."""
        whole = self.judged({place: torch.ones_like(mask) for place, mask in self.paths.items()})
        ranking = self._attributed(bar) if self.config.method == "attribution" else self._learned(seed, bar)
        best = self._dropped(self._bisected(ranking), ranking)
        return self.circuit(best, whole.loss)

    def circuit(self, judged: Judged, loss_full_model: float) -> Circuit:
        """The circuit of the nodes that are on."""
        nodes = {place: tuple(mask.nonzero().squeeze(1).tolist()) for place, mask in judged.on.items()}
        return Circuit(
            self.task,
            nodes,
            edges_between(self.model, judged.on),
            {place: mean.cpu() for place, mean in self.means.items()},
            *judged.calibration,
            loss=judged.loss,
            loss_full_model=loss_full_model,
            settings=self.config.recorded(),
        )

    @torch.no_grad()
    def judged(self, on: On) -> Judged:
        """The loss of a circuit on the pairs that choose the size, calibrated on training pairs."""
        fit = 2 * len(self.calibration)
        prompts, prefixes = self._both_prompts(self.calibration, self.judge)
        logits = self.masked_pass.logits(prefixes, Masks.fixed(self.means, on))
        differences = prompts.differences(logits)
        calibration = calibrate(differences[:fit], prompts.sign[:fit])
        loss = task_loss(differences[fit:].double(), prompts.sign[fit:].double(), *calibration).item()
        return Judged(on, loss, calibration)

    def _both_prompts(self, *pairs: Int[Tensor, " _"]) -> tuple[Presented, Prefixes]:
        """Both prompts of some pairs after both prompts of others, with their prefixes."""
        rows = torch.cat([torch.cat([some, some + len(self.prompts.sign) // 2]) for some in pairs])
        return self.prompts.take(rows), self.prefixes.take(rows)

    def _attributed(self, bar: Bar) -> Ranking:
        """Rank the nodes on paths by what freezing each does to the loss on training pairs, of either sign."""
        prompts, _ = self._both_prompts(self.train)
        found = attributions(self.model, prompts, self.means, 2 * self.config.pairs_per_step, bar.advance)
        return Ranking({place: self._on_paths(place, one.abs()) for place, one in found.items()}, 1)

    def _learned(self, seed: int, bar: Bar) -> Ranking:
        """Train the masks of the nodes on paths, and rank them by their parameters."""
        c = self.config
        generator = torch.Generator().manual_seed(c.seed * 1009 + seed)
        masks = Masks(self.means, self.paths, generator)
        free = torch.zeros(2, device=self.model.device, requires_grad=True)  # log of the scale, and the shift
        optimizer = torch.optim.AdamW(
            [{"params": list(masks.parameters.values())}, {"params": [free], "weight_decay": 0.0}],
            lr=c.lr,
            betas=(0.9, 0.95),
            weight_decay=c.weight_decay,
        )
        price = torch.full((), c.price, device=self.model.device)
        for step in range(c.steps):
            for group in optimizer.param_groups:
                group["lr"] = c.lr * (1 - step / c.steps)
            rows = torch.randperm(len(self.train), generator=generator)[: c.pairs_per_step]
            prompts, prefixes = self._both_prompts(self.train[rows.to(self.train.device)])
            differences = prompts.differences(self.masked_pass.logits(prefixes, masks))
            scale = free[0].exp().clamp(max=MAX_SCALE)
            loss = task_loss(differences, prompts.sign, scale, free[1])
            optimizer.zero_grad()
            (loss + price * masks.count()).backward()
            torch.nn.utils.clip_grad_norm_(list(masks.parameters.values()), 1.0)
            optimizer.step()
            masks.clamp()
            # On the device, so that no step waits for it.
            price *= torch.where(loss.detach() < c.target_loss, 1 + c.price_step, 1 - c.price_step)
            note = None
            if step % 20 == 19 or step + 1 == c.steps:
                note = f"loss {loss.item():.3f}, {sum(int(mask.sum()) for mask in masks.on().values())} nodes"
            bar.advance(note=note)
        scores = {place: self._on_paths(place, one.detach()) for place, one in masks.parameters.items()}
        # First up from what the masks have learned, since they may have gone a little too far.
        return Ranking(scores, max(1, sum(int(mask.sum()) for mask in masks.on().values())))

    def _on_paths(self, place: str, scores: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Scores of the nodes of a place, where those that are on no path come last."""
        return torch.where(self.paths[place], scores, -torch.inf)

    def _bisected(self, ranking: Ranking) -> Judged:
        """The fewest nodes, those of the largest scores, that reach the target."""
        scores = torch.cat([ranking.scores[place] for place in self.paths])
        order = scores.argsort(descending=True, stable=True)
        low, high = 0, int((scores > -torch.inf).sum())
        best, n = None, ranking.first_try
        while best is None:
            judged = self.judged(self._first(order, n))
            if judged.loss <= self.config.target_loss:
                best, high = judged, n
            elif n >= high:
                raise TargetNotReached(
                    f"task {self.task!r} does not come under target_loss={self.config.target_loss}: the best loss is "
                    f"{judged.loss:.3f}, with all {high} nodes on a path; raise target_loss, or train the model longer",
                    judged.loss,
                )
            else:
                low, n = n, min(high, 2 * n)
        while high - low > 1:
            middle = (low + high) // 2
            judged = self.judged(self._first(order, middle))
            if judged.loss <= self.config.target_loss:
                best, high = judged, middle
            else:
                low = middle
        return best

    def _first(self, order: Int[Tensor, " nodes"], n: int) -> On:
        """The first n nodes of an order over all places."""
        chosen = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        chosen[order[:n]] = True
        sizes = [len(mask) for mask in self.paths.values()]
        return dict(zip(self.paths, chosen.split(sizes), strict=True))

    def _dropped(self, best: Judged, ranking: Ranking) -> Judged:
        """Without nodes that are on no path of the circuit, then without those that it does not need.

        A ranking may put a node that is needed after hundreds that are not, which the bisection then keeps. Nodes of
        the smallest scores are tried first.
        """
        best = self._connected(best)
        nodes = [(place, int(i)) for place, mask in best.on.items() for i in mask.nonzero()]
        nodes.sort(key=lambda node: ranking.scores[node[0]][node[1]].item())

        def suffices(kept: list[tuple[str, int]]) -> bool:
            nonlocal best
            on = {place: torch.zeros_like(mask) for place, mask in best.on.items()}
            for place, index in kept:
                on[place][index] = True
            judged = self.judged(on)
            if enough := judged.loss <= self.config.target_loss:
                best = judged
            return enough

        reduced(nodes, suffices, TRIALS)
        return self._connected(best)

    def _connected(self, best: Judged) -> Judged:
        """Without the nodes that no path through the circuit joins to a token and an answer, if that may be."""
        judged = self.judged(on_paths(self.model, self.tokens, self.answers, best.on))
        return judged if judged.loss <= self.config.target_loss else best


def search_result(search: Callable[[], Circuit]) -> Circuit | TargetNotReached:
    """What a search finds, or why it finds nothing."""
    try:
        return search()
    except TargetNotReached as error:
        return error


def found_size(found: Circuit | TargetNotReached) -> dict[str, Any]:
    """The size of what a search finds, None where it does not reach the target, and the loss."""
    if isinstance(found, TargetNotReached):
        return {"nodes": None, "edges": None, "loss": found.loss}
    return {"nodes": found.n_nodes, "edges": found.n_edges, "loss": found.loss}
