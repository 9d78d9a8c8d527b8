"""Gradient steps on maps between standardised streams (method, section 3).

With hats for standardised streams, (h - mean) / std per channel, a bridge's affine map z = W h + b is

    z^ = W^ h^ + b^      W = diag(std_z) W^ diag(1 / std_h)      b = mean_z + std_z b^ - W mean_h

An optimiser that steps on W^ and b^ takes steps of one size for streams of any scale. The bridge itself keeps plain
weights: they are what losses are computed with, and gradients come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.bridge import Bridge, BridgeSet
from bridges.fitting.ridge import Standardization

LR_WIDTH = 64
"""The widest input for which a weight's learning rate is that of the settings."""
Standardizations = Sequence[tuple[Standardization, Standardization]]
"""Per bridge, of the dense and of the sparse stream."""


class _Map(NamedTuple):
    """One affine map of a bridge, plain and standardised."""

    plain_weight: Float[Tensor, "d_out d_in"]
    plain_bias: Float[Tensor, " d_out"]
    weight: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, " d_out"]
    source: Standardization
    target: Standardization

    def scale(self) -> Float[Tensor, "d_out d_in"]:
        """What a standardised weight is multiplied by to give the plain one."""
        return (self.target.std[:, None] / self.source.std).to(self.weight)

    def unfold(self) -> None:
        """Set the standardised map to the plain one."""
        self.weight.copy_(self.plain_weight / self.scale())
        offset = self.plain_weight.double() @ self.source.mean - self.target.mean
        self.bias.copy_((self.plain_bias.double() + offset) / self.target.std)

    def fold(self) -> None:
        """Set the plain map to the standardised one."""
        self.plain_weight.copy_(self.weight * self.scale())
        offset = self.target.mean - self.plain_weight.double() @ self.source.mean
        self.plain_bias.copy_(self.bias.double() * self.target.std + offset)

    def pull_gradient(self) -> None:
        """Set the standardised map's gradient from the plain one's, by the chain rule."""
        grads = self.plain_weight.grad, self.plain_bias.grad
        grad_weight, grad_bias = (torch.zeros_like(p) if g is None else g for g, p in zip(grads, self[:2], strict=True))
        # The plain bias depends on the plain weight: d b / d W = -mean_h.
        about_mean = torch.addr(grad_weight, grad_bias, self.source.mean.to(grad_bias), alpha=-1)
        self.weight.grad = about_mean * self.scale()
        self.bias.grad = grad_bias * self.target.std.to(grad_bias)


class StandardizedBridges:
    """The maps of a bridge set between standardised streams, which an optimiser steps on.

    After the gradients of the bridges are complete: `pull_gradients`, a step on `parameters`, `fold`.
    """

    def __init__(self, bridge_set: BridgeSet, standardizations: Standardizations = (), standardized: bool = False):
        """Without `standardizations` the maps are the plain ones.

        `standardized`: what the bridges hold are the standardised maps; `fold` makes plain ones of them.
        """
        self.standardizations = standardizations or [_identity(bridge) for bridge in bridge_set]
        self._maps = [
            one
            for bridge, sides in zip(bridge_set, self.standardizations, strict=True)
            for one in _maps(bridge, *sides)
        ]
        if standardized:
            self._copy()
        else:
            self.unfold()

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The standardised weights and biases with their learning rates, for an optimiser.

        A step of Adam moves every weight by about the learning rate. The d_in weights of one output move together where
        inputs vary together, so their rate falls with the width from 64 on: one step changes no output by much
        more than 64 `lr` standard deviations.
        """
        groups: dict[float, list[Tensor]] = {}
        for one in self._maps:
            groups.setdefault(lr * min(1.0, LR_WIDTH / one.weight.shape[1]), []).append(one.weight)
            groups.setdefault(lr, []).append(one.bias)
        return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]

    @torch.no_grad()
    def unfold(self) -> None:
        """Set the standardised maps to what the bridges hold."""
        for one in self._maps:
            one.unfold()

    @torch.no_grad()
    def _copy(self) -> None:
        for one in self._maps:
            one.weight.copy_(one.plain_weight)
            one.bias.copy_(one.plain_bias)

    @torch.no_grad()
    def fold(self) -> None:
        """Set the bridges' weights to the standardised maps."""
        for one in self._maps:
            one.fold()

    @torch.no_grad()
    def pull_gradients(self) -> None:
        """Set the gradients of `parameters` from those of the bridges."""
        for one in self._maps:
            one.pull_gradient()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint needs."""
        maps = {f"{i}.{name}": value for i, one in enumerate(self._maps) for name, value in _own_tensors(one).items()}
        return maps | {
            f"{i}.{side}.{name}": value
            for i, sides in enumerate(self.standardizations)
            for side, one in zip(("dense", "sparse"), sides, strict=True)
            for name, value in one._asdict().items()
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the maps to what `tensors` gave: bit for bit, which the plain weights could not give back."""
        for i, one in enumerate(self._maps):
            for name, value in _own_tensors(one).items():
                value.copy_(tensors[f"{i}.{name}"])


def standardizations_from(tensors: Mapping[str, Tensor], n_bridges: int, device: torch.device) -> Standardizations:
    """The standardisations in what `StandardizedBridges.tensors` gave."""

    def side(i: int, name: str) -> Standardization:
        mean, std = (tensors[f"{i}.{name}.{part}"].to(device) for part in Standardization._fields)
        return Standardization(mean, std)

    return [(side(i, "dense"), side(i, "sparse")) for i in range(n_bridges)]


def _own_tensors(one: _Map) -> dict[str, Tensor]:
    return {"weight": one.weight, "bias": one.bias}


def _maps(bridge: Bridge, dense: Standardization, sparse: Standardization) -> Iterator[_Map]:
    for weight, bias, source, target in (
        (bridge.encoder_weight, bridge.encoder_bias, dense, sparse),
        (bridge.decoder_weight, bridge.decoder_bias, sparse, dense),
    ):
        own_weight, own_bias = (torch.empty_like(tensor).requires_grad_() for tensor in (weight, bias))
        yield _Map(weight, bias, own_weight, own_bias, source, target)


def _identity(bridge: Bridge) -> tuple[Standardization, Standardization]:
    d_sparse, d_dense = bridge.encoder_weight.shape

    def side(width: int) -> Standardization:
        zeros = torch.zeros(width, dtype=torch.float64, device=bridge.encoder_weight.device)
        return Standardization(zeros, torch.ones_like(zeros))

    return side(d_dense), side(d_sparse)
