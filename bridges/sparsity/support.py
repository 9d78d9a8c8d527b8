"""Computing with the nonzeros of a weight-sparse model alone: training that keeps its zeros, and faster products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bridges.models.modes import replaced_forwards
from bridges.ops.compiled import has_parallel_kernel
from bridges.ops.sparse_linear import NonzeroPattern, sparse_linear
from bridges.sparsity.projection import sparse_parameters

MAX_KERNEL_DENSITY = 1 / 10
"""Up to this density, `sparse_linear` is faster than the dense product (benchmarks/bench_sparse_linear.py)."""


@dataclass
class _SparseTensor:
    """A tensor of the model and the vector of its nonzeros, which is what the optimiser trains."""

    parameter: nn.Parameter
    index: Tensor
    """Of the nonzeros, into the flattened tensor."""
    values: nn.Parameter

    @torch.no_grad()
    def gather_gradient(self) -> None:
        """Add the nonzeros' part of the tensor's gradient to that of the values, and clear the tensor's."""
        if self.parameter.grad is not None:
            gathered = self.parameter.grad.flatten()[self.index]
            self.values.grad = gathered if self.values.grad is None else self.values.grad + gathered
            self.parameter.grad = None

    @torch.no_grad()
    def scatter(self) -> None:
        """Write the values into the model's tensor."""
        self.parameter.view(-1)[self.index] = self.values


class Support:
    """The entries of a model's sparse tensors that may differ from zero, as one trainable vector per tensor.

    `masks` are those of `supports(model)`, by name; the parameters that are not sparse train whole. With
    `use_kernels`, linear maps on the CPU of at most `MAX_KERNEL_DENSITY` multiply by the vectors inside
    `sparse_kernels()`. ValueError if the names in `masks` are not those of the model's sparse tensors.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], use_kernels: bool = True):
        sparse = dict(sparse_parameters(model))
        if sparse.keys() != masks.keys():
            raise ValueError(
                f"masks must have the names of supports(model); they differ in {sorted(sparse.keys() ^ masks.keys())}"
            )
        self.masks = dict(masks)
        self._sparse: list[_SparseTensor] = []
        self._unpruned = [p for name, p in model.named_parameters() if name not in sparse and p.requires_grad]
        values: dict[Tensor, tuple[nn.Parameter, Tensor]] = {}
        for name, parameter in sparse.items():
            if parameter.requires_grad:
                index = masks[name].to(parameter.device).flatten().nonzero().squeeze(1)
                tensor = _SparseTensor(parameter, index, nn.Parameter(parameter.detach().flatten()[index]))
                self._sparse.append(tensor)
                values[parameter] = tensor.values, masks[name]
        self._forwards = _sparse_forwards(model, values) if use_kernels else {}

    def parameters(self) -> list[nn.Parameter]:
        """What an optimiser is to train: the vectors of values, then the parameters that are not sparse."""
        return [*(tensor.values for tensor in self._sparse), *self._unpruned]

    def sparse_kernels(self) -> AbstractContextManager[None]:
        """Context in which the model's forward passes multiply by the values where that is faster."""
        return replaced_forwards(self._forwards)

    def gather_gradients(self) -> None:
        """Bring all gradients to `parameters()`; call it after a backward pass."""
        for tensor in self._sparse:
            tensor.gather_gradient()

    def scatter(self) -> None:
        """Write the values into the model; call it after an optimiser's step."""
        for tensor in self._sparse:
            tensor.scatter()


def use_sparse_kernels(model: nn.Module) -> AbstractContextManager[None]:
    """Context in which a frozen model multiplies by the nonzeros alone of its matrices of low density.

    The nonzeros are copied when the context is made: weights must not change inside.
    """
    forwards = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and _is_low_density(module.weight, mask := module.weight != 0):
            forwards[module] = _sparse_forward(module.weight.detach()[mask], mask, module.bias)
    return replaced_forwards(forwards)


def _sparse_forwards(
    model: nn.Module, values: Mapping[Tensor, tuple[nn.Parameter, Tensor]]
) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """The forward of each linear map of low density whose weight is in `values`, with its values and its mask."""
    forwards = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight in values:
            own_values, mask = values[module.weight]
            if _is_low_density(module.weight, mask):
                forwards[module] = _sparse_forward(own_values, mask, module.bias)
    return forwards


def _is_low_density(weight: Tensor, mask: Tensor) -> bool:
    return has_parallel_kernel(weight) and bool(mask.sum() <= MAX_KERNEL_DENSITY * mask.numel())


def _sparse_forward(values: Tensor, mask: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    pattern = NonzeroPattern.from_mask(mask)
    return lambda x: sparse_linear(x, values, pattern, bias)
