"""Learned masks over nodes: a node is on where its parameter is over 0; it learns by a surrogate gradient (A.5)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridges.circuits.nodes import replaced_nodes
from bridges.models.sparse.model import SparseTransformer

INITIAL_VALUE = 0.1
INITIAL_NOISE = 0.01


class Masks:
    """One parameter in [-1, 1] for each node; `on()` says which nodes are on.

    Args:
        means: what nodes that are off are frozen at, by place.
        allowed: nodes that may be on; the others are off for good.
        generator: of the noise that the parameters start with, which breaks ties.
    """

    def __init__(
        self,
        means: Mapping[str, Float[Tensor, " _"]],
        allowed: Mapping[str, Bool[Tensor, " _"]],
        generator: torch.Generator,
    ):
        self.means, self.allowed = dict(means), dict(allowed)
        self.parameters: dict[str, Tensor] = {}
        for place, mean in means.items():
            noise = torch.randn(len(mean), generator=generator).to(mean) * INITIAL_NOISE
            start = torch.where(allowed[place], INITIAL_VALUE + noise, -1.0)
            self.parameters[place] = start.requires_grad_()

    @classmethod
    def fixed(cls, means: Mapping[str, Float[Tensor, " _"]], on: Mapping[str, Bool[Tensor, " _"]]) -> Masks:
        """Masks that do not learn, by which these nodes are on."""
        masks = cls(means, on, torch.Generator())
        masks.parameters = {place: 2.0 * on[place].to(mean) - 1 for place, mean in means.items()}
        return masks

    def on(self) -> dict[str, Bool[Tensor, " _"]]:
        """Which nodes are on, by place."""
        return {place: parameter.detach() > 0 for place, parameter in self.parameters.items()}

    def count(self) -> Float[Tensor, ""]:
        """How many nodes are on, with the surrogate gradient."""
        counts = [_Heaviside.apply(p).sum() for p in self.parameters.values()]  # pyright: ignore
        return torch.stack(counts).sum()

    def applied(self, model: SparseTransformer) -> AbstractContextManager[None]:
        """Context in which the model runs with nodes that are off frozen at their means."""
        functions = {
            place: partial(masked, parameter=parameter, mean=self.means[place])
            for place, parameter in self.parameters.items()
        }
        return replaced_nodes(model, functions)

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring the parameters back to [-1, 1] after a step; nodes that are not allowed stay off."""
        for place, parameter in self.parameters.items():
            parameter.clamp_(-1, 1).masked_fill_(~self.allowed[place], -1.0)


def ablated(
    model: SparseTransformer, on: Mapping[str, Bool[Tensor, " _"]], means: Mapping[str, Float[Tensor, " _"]]
) -> AbstractContextManager[None]:
    """Context in which the nodes that are not on are frozen at their means; the others stay bit for bit."""
    functions = {
        place: partial(_frozen, on=on[place].to(model.device), mean=mean.to(model.device, model.dtype))
        for place, mean in means.items()
        if not bool(on[place].all())
    }
    return replaced_nodes(model, functions)


def _frozen(x: Float[Tensor, "b s d"], on: Bool[Tensor, " d"], mean: Float[Tensor, " d"]) -> Float[Tensor, "b s d"]:
    return torch.where(on, x, mean.to(x.dtype))


def masked(x: Float[Tensor, "*rows d"], parameter: Float[Tensor, " d"], mean: Float[Tensor, " d"]) -> Tensor:
    """x where the parameter is over 0, else the mean, with the surrogate gradient."""
    return _Masked.apply(x, parameter, mean)  # pyright: ignore[reportReturnType]


def surrogate_slope(parameter: Tensor) -> Tensor:
    """The derivative of a sigmoid at temperature 1, in the place of that of a step."""
    return parameter.sigmoid() * (1 - parameter.sigmoid())


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.save_for_backward(parameter)
        return (parameter > 0).to(parameter.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (parameter,) = ctx.saved_tensors
        return grads[0] * surrogate_slope(parameter)


class _Masked(torch.autograd.Function):
    """x where the node is on, its mean where it is off; bit for bit, unlike mean + mask * (x - mean)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, mean: Tensor) -> Tensor:
        ctx.save_for_backward(x, parameter, mean)
        return torch.where(parameter > 0, x, mean)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, parameter, mean = ctx.saved_tensors
        grad = grads[0]
        x_grad = torch.where(parameter > 0, grad, 0) if ctx.needs_input_grad[0] else None
        effect = (grad * x).flatten(0, -2).sum(0) - grad.flatten(0, -2).sum(0) * mean
        return x_grad, effect * surrogate_slope(parameter), None
