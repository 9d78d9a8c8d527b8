"""controls(): what else does a circuit's task, without which its figures mean nothing (method, section 6, a to k).

Complete ablation can fit a nonsense task or a model with permuted weights. So beside a circuit's loss stand its
necessity, what happens when nodes outside it run, and the circuits of tasks and models that have nothing to find.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from bridges.circuits.circuit import Circuit
from bridges.circuits.dense_twin import as_small, load_dense_twin, same_class_sizes, twin_verdict
from bridges.circuits.masks import ablated
from bridges.circuits.necessity import NECESSARY_LOSS, necessity
from bridges.circuits.nodes import node_means, recorded_nodes, replaced_nodes
from bridges.circuits.pruning import frozen_and_fast
from bridges.circuits.search import Search, found_size, search_result
from bridges.circuits.seeds import over_seeds
from bridges.circuits.settings import PruneConfig
from bridges.circuits.task_loss import Calibration, Presented, accuracy, answer_differences, calibrate, task_loss
from bridges.circuits.text import mean_text
from bridges.io.progress import Bar, progress_bar
from bridges.models.loading import as_residual, find_tokenizer
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.models.tokens import Batch
from bridges.ops.kl import kl_divergence
from bridges.sparsity.projection import sparse_parameters
from bridges.tasks.pairs import TASKS, TaskPairs, task_pairs

KEPT_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Shares of the nodes outside the circuit that run in control (c)."""
DRAWS = 5
TEXT_ROWS = 16
OTHER_TASK_PAIRS = 24


@torch.inference_mode(False)
@torch.enable_grad()
def controls(
    sparse: nn.Module | ResidualModel | str | Path,
    circuit: Circuit,
    pairs: TaskPairs | None = None,
    *,
    tokenizer: Any = None,
    text: Int[Tensor, "rows seq"] | None = None,
    searches: bool = True,
    dense_twin: nn.Module | ResidualModel | str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the controls of a circuit; `dataclasses.replace(circuit, controls=...)` stores them with it.

    Args:
        sparse: the model that the circuit was pruned from.
        circuit: of one of `TASKS`, or of `pairs`.
        pairs: pairs that the circuit was not found on; by default drawn anew for its task, by another seed.
        tokenizer: makes prompts; by default the one saved with the model.
        text: token rows for means and side effects; by default as in `prune`.
        searches: whether to search for circuits too, at the cost of one pruning each: of shuffled labels (its size is
            chosen on the pairs that train masks, whose answers it may know by heart), of a cue that means nothing, of
            permuted weights, of another seed, and without the nodes of this circuit.
        dense_twin: a `SparseTransformer` with dense weights, the same tokens and about the same loss on text, in which
            the task's circuit is searched for too, also with `searches=False`; by default there is none.
        progress: whether to show a progress bar.

    Returns:
        By name: `heldout`, `necessity`, `outside_kept`, `elsewhere`, `interchange`; with `searches` also
        `shuffled_labels`, `meaningless_cue`, `permuted_weights`, `other_seed` and `forbidden`, each with the size of
        its circuit, or None and the best loss; `other_seed` also with sizes, overlap and union over as many circuits as
        the setting `seeds` says, this one included, two at least; with `dense_twin` also `attribution`, the size of the
        model's own circuit by attribution, and `dense_twin`, sizes in the other model by `masks` and by `attribution`,
        with both models' losses on text (`text_ce`, `text_ce_own`); `verdict` says where a control does as well as the
        circuit, in lines of a few words, a colon and the figures.

    Raises ValueError if the model is not the one that the circuit was pruned from, or `dense_twin` is of another class
    or has other tokens.

    >>> import bridges, torch
    >>> pair = bridges.load_pair()
    >>> rows = torch.randint(1024, (4, 16), generator=torch.Generator().manual_seed(0))
    >>> circuit = Circuit("for_while", {"final.read": (5, 6)}, [], node_means(pair.sparse, [(rows, None)]))
    >>> pairs = task_pairs("for_while", pair.tokenizer, 8)
    >>> sorted(controls(pair.sparse, circuit, pairs, text=rows, searches=False, progress=False))
    ['elsewhere', 'heldout', 'interchange', 'necessity', 'outside_kept', 'verdict']
    """
    model = as_residual(sparse).model
    if not isinstance(model, SparseTransformer):
        raise ValueError(
            f"sparse={type(model).__name__} must be the SparseTransformer that the circuit was pruned from"
        )
    config = PruneConfig.from_values({k: v for k, v in circuit.settings.items() if k in PruneConfig.model_fields})
    known = tokenizer if tokenizer is not None else find_tokenizer(sparse)
    twin = None if dense_twin is None else load_dense_twin(dense_twin, model, known)
    fresh = task_pairs(circuit.task, known, config.n, config.seed + 1) if pairs is None else pairs
    frozen_twin = nullcontext() if twin is None else frozen_and_fast(twin)
    with frozen_and_fast(model), frozen_twin, progress_bar(f"controls of {circuit.task}", None, progress) as bar:
        batches = mean_text(model, text, known, config.text_tokens, config.seed + 1)
        found: dict[str, Any] = {
            "heldout": circuit.evaluate(model, fresh)._asdict(),
            "necessity": necessity(model, circuit, fresh),
            "outside_kept": outside_kept(model, circuit, fresh, config.seed),
            "elsewhere": elsewhere(model, circuit, batches[0][0][:TEXT_ROWS], known),
            "interchange": interchange(model, circuit, fresh),
        }
        bar.advance()
        if searches:
            for name, of_seeds in _searches(model, circuit, fresh, config, batches).items():
                results = [search_result(lambda search=search: search(bar)) for search in of_seeds]
                found[name] = found_size(results[0])
                if name == "other_seed":
                    found[name] |= over_seeds(circuit, results)
        if twin is not None:
            found |= same_class_sizes(model, twin, circuit.means, fresh, config, batches, bar)
    return {**found, "verdict": verdict(circuit, found)}


@torch.no_grad()
def outside_kept(
    model: SparseTransformer, circuit: Circuit, pairs: TaskPairs, seed: int = 0, draws: int = DRAWS
) -> list[dict[str, float]]:
    """(c) The loss when each node outside the circuit runs with a probability, the same nodes for all prompts."""
    prompts, inside = Presented.of(pairs, model.device), circuit.masks(model)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for share in KEPT_SHARES:
        losses = []
        for _ in range(draws if 0 < share < 1 else 1):
            kept = {p: m | (torch.rand(len(m), generator=generator) < share).to(m.device) for p, m in inside.items()}
            with ablated(model, kept, circuit.means):
                differences = answer_differences(model, prompts).double()
            sign = prompts.sign.double()
            losses.append(task_loss(differences, sign, *calibrate(differences, sign)).item())
        rows.append({"share": share, "mean": sum(losses) / len(losses), "worst": max(losses)})
    return rows


@torch.no_grad()
def elsewhere(
    model: SparseTransformer, circuit: Circuit, text: Int[Tensor, "rows seq"], tokenizer: Any = None
) -> dict[str, Any]:
    """(h) What ablating the circuit does elsewhere: KL from the whole model on text, and accuracy of other tasks."""
    text = text.to(model.device)
    whole = model(text).logits.flatten(0, 1)
    with circuit.ablate(model):
        kl = kl_divergence(whole, model(text).logits.flatten(0, 1)).item() / text.numel()
    found: dict[str, Any] = {"text_kl": kl, "tasks": {}}
    others = [] if tokenizer is None else [task for task in TASKS if task != circuit.task]
    for task in others:
        prompts = Presented.of(task_pairs(task, tokenizer, OTHER_TASK_PAIRS), model.device)
        before = accuracy(answer_differences(model, prompts), prompts.sign, Calibration())
        with circuit.ablate(model):
            after = accuracy(answer_differences(model, prompts), prompts.sign, Calibration())
        found["tasks"][task] = {"whole": before, "ablated": after}
    return found


@torch.no_grad()
def interchange(model: SparseTransformer, circuit: Circuit, pairs: TaskPairs) -> dict[str, float]:
    """(i) Nodes of the circuit get their values on the counterfactual prompt, everything else is left alone.

    `followed` is how far the intact model's difference of answers goes from its own value (0) to that on the
    counterfactual prompt (1); `flipped` the share of prompts whose answer turns.
    """
    prompts = Presented.of(pairs, model.device)
    n = len(pairs.input_ids)
    swapped = prompts._replace(input_ids=prompts.input_ids.roll(n, 0))
    inside = {place: mask for place, mask in circuit.masks(model).items() if mask.any()}
    before = answer_differences(model, prompts)
    with recorded_nodes(model, inside) as values:
        after = answer_differences(model, swapped)
        there = dict(values)

    def exchanged(place: str) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.where(inside[place], there[place], x)

    with replaced_nodes(model, {place: exchanged(place) for place in inside}):
        edited = answer_differences(model, prompts)
    moved, distance = (edited - before).sum(), (after - before).sum()
    return {"followed": (moved / distance).item(), "flipped": (edited < 0).double().mean().item()}


def _searches(
    model: SparseTransformer, circuit: Circuit, pairs: TaskPairs, config: PruneConfig, text: Sequence[Batch]
) -> Mapping[str, list[Callable[[Bar], Circuit]]]:
    """The searches of each control, one of them or one for each seed."""
    means = {place: mean.to(model.device) for place, mean in circuit.means.items()}

    def pruned(
        other: SparseTransformer,
        of: TaskPairs,
        seeds: Sequence[int] = (0,),
        settings: PruneConfig | None = None,
        **options: Any,
    ) -> list[Callable[[Bar], Circuit]]:
        def search(bar: Bar, seed: int) -> Circuit:
            with frozen_and_fast(other):
                own = means if other is model else node_means(other, text)
                return Search(other, of, own, settings or config, **options).run(seed, bar)

        return [partial(search, seed=seed) for seed in seeds]

    return {
        # A coin says nothing about other pairs, so it is judged on those that masks are trained on.
        "shuffled_labels": pruned(
            model, shuffled_labels(pairs, config.seed), settings=config.with_settings({"judge_share": 0})
        ),
        "meaningless_cue": pruned(model, meaningless_cue(pairs, config.seed)),
        "permuted_weights": pruned(permuted_weights(model, config.seed), pairs),
        "other_seed": pruned(model, pairs, range(1, max(2, config.seeds))),
        "forbidden": pruned(model, pairs, forbidden=circuit.masks(model)),
    }


def shuffled_labels(pairs: TaskPairs, seed: int = 0) -> TaskPairs:
    """(d) The same prompts, where a coin says for each pair whether its two answers are exchanged."""
    n = len(pairs.input_ids)
    flip = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5
    width = max(pairs.answers.shape[1], pairs.targets.shape[1])
    answers, targets = (
        nn.functional.pad(one, (0, width - one.shape[1]), value=-1) for one in (pairs.answers, pairs.targets)
    )
    return pairs.replaced(
        task=f"{pairs.task}, shuffled labels",
        answers=torch.where(flip[:, None], targets, answers),
        targets=torch.where(flip[:, None], answers, targets),
    )


def meaningless_cue(pairs: TaskPairs, seed: int = 0) -> TaskPairs:
    """(d) The same answers to prompts whose cues are replaced by two tokens that occur in the prompts elsewhere."""
    cue = pairs.input_ids != pairs.counterfactual_ids
    cues = torch.cat([pairs.input_ids[cue], pairs.counterfactual_ids[cue]]).unique().tolist()
    real = pairs.input_ids[pairs.attention_mask.bool() & ~cue]
    others = [token for token in real.unique().tolist() if token not in cues]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:2].tolist()
    first, second = (others[i] for i in order)
    swap = (pairs.direction == 1)[:, None].expand_as(cue)
    one, two = torch.where(swap, second, first), torch.where(swap, first, second)
    return pairs.replaced(
        task=f"{pairs.task}, meaningless cue",
        input_ids=torch.where(cue, one, pairs.input_ids),
        counterfactual_ids=torch.where(cue, two, pairs.counterfactual_ids),
    )


@torch.no_grad()
def permuted_weights(model: SparseTransformer, seed: int = 0) -> SparseTransformer:
    """(e) A copy whose nonzero weights are permuted within each tensor: the same support and the same values."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for module in other.modules():
        vars(module).pop("forward", None)  # inside `use_sparse_kernels` it multiplies by the nonzeros of `model`
    for _, parameter in sparse_parameters(other):
        at = parameter.flatten().nonzero().squeeze(1)
        order = torch.randperm(len(at), generator=generator).to(at.device)
        parameter.view(-1)[at] = parameter.flatten()[at[order]]
    return other.requires_grad_(False)


def verdict(circuit: Circuit, found: Mapping[str, Any]) -> list[str]:
    """In words, every control that does as well as the circuit; one line that says so where none does.

    A line is a few words, a colon and the figures.
    """
    lines = []
    target = circuit.settings.get("target_loss", math.inf)
    if found["heldout"]["loss"] > 2 * target:
        lines.append(f"fails on new pairs: the loss there is {found['heldout']['loss']:.3f}, over twice the target")
    if found["necessity"]["loss"] < NECESSARY_LOSS:
        lines.append(
            f"not necessary: without the circuit the model does the task too (loss {found['necessity']['loss']:.3f}), "
            "by other nodes"
        )
    worst = max(row["worst"] for row in found["outside_kept"])
    if worst > 2 * max(target, circuit.loss):
        lines.append(f"disturbed from outside: with some other nodes running, the loss rises to {worst:.3f}")
    if found["interchange"]["followed"] < 0.5:
        followed = found["interchange"]["followed"]
        lines.append(
            f"does not carry the answer: exchanging its nodes moves the whole model's only {followed:.0%} of the way"
        )
    for name in ("shuffled_labels", "meaningless_cue", "permuted_weights"):
        nodes = found.get(name, {}).get("nodes")
        if nodes is not None and as_small(nodes, circuit.n_nodes):
            lines.append(
                f"{name.replace('_', ' ')}: a circuit of {nodes} nodes is found there too, against {circuit.n_nodes}"
            )
    nodes = found.get("forbidden", {}).get("nodes")
    if nodes is not None:
        lines.append(f"redundant: without these nodes another circuit of {nodes} nodes is found")
    lines += twin_verdict(circuit, found)
    return lines or ["no control does as well as the circuit"]
