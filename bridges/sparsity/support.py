"""Training that keeps the zeros of its start: only the entries that are not zero are trained and multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bridges.models.modes import replaced_forwards
from bridges.ops.compiled import has_kernel
from bridges.ops.sparse_linear import NonzeroPattern, sparse_linear
from bridges.sparsity.projection import sparse_parameters

MAX_KERNEL_DENSITY = 1 / 10
"""The density up to which multiplying nonzeros alone is the faster way (benchmarks/bench_sparse_linear.py)."""


@dataclass
class _Trained:
    """One tensor of the model and the vector of its nonzeros, which is what the optimiser sees."""

    parameter: nn.Parameter
    index: Tensor
    values: nn.Parameter

    @torch.no_grad()
    def gather_gradient(self) -> None:
        """What reached the whole tensor, added to what reached the values by themselves."""
        if self.parameter.grad is not None:
            here = self.parameter.grad.flatten()[self.index]
            self.values.grad = here if self.values.grad is None else self.values.grad + here
            self.parameter.grad = None

    @torch.no_grad()
    def scatter(self) -> None:
        """The values back into the model's tensor."""
        self.parameter.view(-1)[self.index] = self.values


class Support:
    """The entries of a model's sparse tensors that may be other than zero, as one vector of values per tensor.

    `masks` by name (those of `sparsity.supports`); the rest of the model trains as it is. With `fast`, linear maps on
    the CPU whose density is at most `MAX_KERNEL_DENSITY` multiply by their values alone inside `multiplying()`.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], fast: bool = True):
        sparse = dict(sparse_parameters(model))
        if sparse.keys() != masks.keys():
            raise ValueError(
                f"masks must be those of supports(model); different: {sorted(sparse.keys() ^ masks.keys())}"
            )
        self.masks = dict(masks)
        self._trained: list[_Trained] = []
        self._rest = [p for name, p in model.named_parameters() if name not in sparse and p.requires_grad]
        values: dict[Tensor, tuple[nn.Parameter, Tensor]] = {}
        for name, parameter in sparse.items():
            if parameter.requires_grad:
                index = masks[name].to(parameter.device).flatten().nonzero().squeeze(1)
                one = _Trained(parameter, index, nn.Parameter(parameter.detach().flatten()[index]))
                self._trained.append(one)
                values[parameter] = one.values, masks[name]
        self._calls = _fast_calls(model, values) if fast else {}

    def parameters(self) -> list[nn.Parameter]:
        """What an optimiser is to train: the vectors of values, then the tensors that are not sparse."""
        return [*(one.values for one in self._trained), *self._rest]

    def multiplying(self) -> AbstractContextManager[None]:
        """Inside, the model's forward passes multiply by values where that is faster."""
        return replaced_forwards(self._calls)

    def gather_gradients(self) -> None:
        """Bring all gradients to `parameters()`, after a backward pass."""
        for one in self._trained:
            one.gather_gradient()

    def scatter(self) -> None:
        """Bring the values back into the model, after an optimiser's step."""
        for one in self._trained:
            one.scatter()


def use_sparse_kernels(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, a frozen model's forward passes multiply by the nonzeros of its thin matrices alone."""
    calls = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and _is_low_density(module.weight, mask := module.weight != 0):
            calls[module] = _call(module.weight.detach()[mask], NonzeroPattern.from_mask(mask), module.bias)
    return replaced_forwards(calls)


def _fast_calls(
    model: nn.Module, values: Mapping[Tensor, tuple[nn.Parameter, Tensor]]
) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    calls = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight in values:
            own, mask = values[module.weight]
            if _is_low_density(module.weight, mask):
                calls[module] = _call(own, NonzeroPattern.from_mask(mask), module.bias)
    return calls


def _is_low_density(weight: Tensor, mask: Tensor) -> bool:
    return has_kernel(weight) and bool(mask.sum() <= MAX_KERNEL_DENSITY * mask.numel())


def _call(values: Tensor, places: NonzeroPattern, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: sparse_linear(x, values, places, bias)
