"""Attribution: how much a task's loss rises, to first order, when a node is frozen at its mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.circuits.nodes import replaced_nodes
from bridges.circuits.prefixes import Prefixes
from bridges.circuits.task_loss import Presented, answer_differences, task_loss
from bridges.models.sparse.model import SparseTransformer

PROMPTS_PER_PASS = 64
"""Prompts of one forward and backward pass."""


@torch.enable_grad()
def attributions(
    model: SparseTransformer,
    prompts: Presented,
    means: Mapping[str, Float[Tensor, " _"]],
    prompts_per_pass: int = PROMPTS_PER_PASS,
    after_pass: Callable[[], object] = lambda: None,
) -> dict[str, Float[Tensor, " _"]]:
    """How much the task loss rises, to first order, when a node alone is frozen at its mean; by place, in nats.

    That is the sum over prompts and positions of the gradient with respect to the node's value times (mean - value).
    Gradients are taken in the whole model, where every node has its own value; the loss is a mean over prompts, of
    logits as they are: scaled, it would have no gradient where a model answers right.

    Args:
        model: in evaluation mode; its parameters get no gradients.
        prompts: both prompts of some pairs.
        means: what a node is frozen at, by place; only these places are attributed to.
        prompts_per_pass: prompts of one forward and backward pass; the result does not depend on it.
        after_pass: called after each.

    Returns:
        One float64 vector [d] for each place.

    >>> import bridges
    >>> from bridges.circuits.nodes import node_means
    >>> _, sparse, tokenizer = bridges.load_pair()
    >>> pairs = bridges.task_pairs("for_while", tokenizer, 4)
    >>> means = node_means(sparse, [(pairs.input_ids, pairs.attention_mask)])
    >>> attributions(sparse, Presented.of(pairs, "cpu"), means)["final.read"].shape
    torch.Size([2048])
    """
    n = len(prompts.sign)
    # A node at (1 - share) * value + share * mean: the gradient of a share that is zero is the attribution, summed over
    # prompts and positions by the backward pass itself, and no value is kept beside it.
    shares = {place: torch.zeros_like(mean).to(model.device).requires_grad_() for place, mean in means.items()}
    functions = {place: partial(_toward, share=share, mean=means[place]) for place, share in shares.items()}
    found = {place: torch.zeros_like(share, dtype=torch.float64) for place, share in shares.items()}
    prefixes = Prefixes.of(prompts.input_ids, prompts.attention_mask)
    for rows in torch.arange(n, device=model.device).split(prompts_per_pass):
        part = prompts.take(rows)
        with replaced_nodes(model, functions):
            differences = answer_differences(model, part, prefixes.take(rows))
        loss = task_loss(differences, part.sign) * (len(rows) / n)
        gradients = torch.autograd.grad(loss, list(shares.values()))
        for place, gradient in zip(found, gradients, strict=True):
            found[place] += gradient
        after_pass()
    return found


def _toward(x: Float[Tensor, "b s d"], share: Float[Tensor, " d"], mean: Float[Tensor, " d"]) -> Float[Tensor, "b s d"]:
    return x + share * (mean.to(x) - x)
