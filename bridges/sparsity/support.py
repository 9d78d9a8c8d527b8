"""Computing with the nonzeros of a weight-sparse model alone: training on a support, which may move, and products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bridges.models.modes import replaced_forwards
from bridges.ops.compiled import has_parallel_kernel
from bridges.ops.sparse_linear import NonzeroPattern, dense_gradient_linear, sparse_linear
from bridges.sparsity.moving import saliency
from bridges.sparsity.projection import sparse_parameters

MAX_KERNEL_DENSITY = 1 / 10
"""Up to this density, `sparse_linear` is faster than the dense product (benchmarks/bench_sparse_linear.py)."""


@dataclass
class _SparseTensor:
    """A tensor of the model and the vector of its nonzeros, which is what the optimiser trains."""

    name: str
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

    @torch.no_grad()
    def move(self, mask: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Train the entries of another mask; those that are new start at zero, with the optimiser's moments at zero."""
        index = mask.to(self.parameter.device).flatten().nonzero().squeeze(1)
        whole = torch.empty_like(self.parameter, memory_format=torch.contiguous_format).flatten()

        def moved(vector: Tensor) -> Tensor:
            whole.zero_()[self.index] = vector
            return whole[index]

        state = optimizer.state.get(self.values, {})
        moments = {name: moved(value) for name, value in state.items() if value.shape == self.values.shape}
        values = moved(self.values.data)
        if len(index) == len(self.index):  # in place: a CUDA graph reads and writes these very tensors
            for name, moment in moments.items():
                state[name].copy_(moment)
            self.values.data.copy_(values)
            self.index.copy_(index)
        else:
            state.update(moments)
            self.values.data, self.index = values, index
        self.values.grad = None
        self.parameter.zero_()
        self.scatter()


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
        self._model, self._use_kernels = model, use_kernels
        self._sparse: list[_SparseTensor] = []
        self._unpruned = [p for name, p in model.named_parameters() if name not in sparse and p.requires_grad]
        for name, parameter in sparse.items():
            if parameter.requires_grad:
                index = masks[name].to(parameter.device).flatten().nonzero().squeeze(1)
                values = nn.Parameter(parameter.detach().flatten()[index])
                self._sparse.append(_SparseTensor(name, parameter, index, values))
        self._forwards = self._build_forwards()

    def _build_forwards(self) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        if not self._use_kernels:
            return {}
        values: dict[Tensor, tuple[nn.Parameter, Tensor]] = {
            tensor.parameter: (tensor.values, self.masks[tensor.name]) for tensor in self._sparse
        }
        return _sparse_forwards(self._model, values)

    def parameters(self) -> list[nn.Parameter]:
        """What an optimiser is to train: the vectors of values, then the parameters that are not sparse."""
        return [*(tensor.values for tensor in self._sparse), *self._unpruned]

    def matrices(self) -> list[nn.Parameter]:
        """Those of `parameters()` that are nonzeros of matrices and embeddings."""
        return [tensor.values for tensor in self._sparse if tensor.parameter.ndim == 2]

    def sparse_kernels(self) -> AbstractContextManager[None]:
        """Context in which the model's forward passes multiply by the values where that is faster."""
        return replaced_forwards(self._forwards)

    def gather_gradients(self) -> None:
        """Bring all gradients to `parameters()`; call it after a backward pass."""
        for tensor in self._sparse:
            tensor.gather_gradient()

    def sum_gradients(
        self, sum_over_processes: Callable[[Iterable[Tensor]], None], whole: bool = False
    ) -> dict[str, Tensor]:
        """Bring all gradients, summed over processes, to `parameters()`.

        With `whole` those of whole tensors are summed too, and returned by name: a move of the support needs them.
        """
        if not whole:
            self.gather_gradients()
            sum_over_processes(self.parameters())
            return {}
        sum_over_processes(self._model.parameters())
        gradients = self.dense_gradients()
        self.gather_gradients()
        return gradients

    def scatter(self) -> None:
        """Write the values into the model; call it after an optimiser's step."""
        for tensor in self._sparse:
            tensor.scatter()

    def dense_gradients(self) -> dict[str, Tensor]:
        """The gradients of whole tensors, by name, after a backward pass outside `sparse_kernels()`.

        Call it before `gather_gradients`, which takes them away from the model.
        """
        return {tensor.name: tensor.parameter.grad for tensor in self._sparse if tensor.parameter.grad is not None}

    def saliencies(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """`saliency` of whole tensors by name, from AdamW's running mean of squared gradients; zeros have none.

        `optimizer` is the one that trains `parameters()`; it has done a step.
        """
        found = {}
        for tensor in self._sparse:
            whole = torch.zeros_like(tensor.parameter)
            squared = optimizer.state[tensor.values]["exp_avg_sq"]
            whole.view(-1)[tensor.index] = saliency(tensor.values.detach(), squared)
            found[tensor.name] = whole
        return found

    def move(self, masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Train the entries of other masks from now on; `optimizer` is the one that trains `parameters()`.

        Entries that leave become zero. New ones start at zero, and so do their moments.
        """
        for tensor in self._sparse:
            tensor.move(masks[tensor.name], optimizer)
        self.masks = dict(masks)
        self._forwards = self._build_forwards()


def training_kernels(
    model: nn.Module, support: Support | None, mixed_precision: str, whole: bool = False
) -> AbstractContextManager[None]:
    """Context for the passes of a step, in which the model multiplies by its nonzeros alone where that is faster.

    All entries of its matrices get gradients there without a support, and with `whole`, before the support moves.
    """
    if support is not None and not whole:
        return support.sparse_kernels()
    return skip_zeros(model) if mixed_precision == "no" else nullcontext()


def use_sparse_kernels(model: nn.Module) -> AbstractContextManager[None]:
    """Context in which a frozen model multiplies by the nonzeros alone of its matrices of low density.

    The nonzeros are copied when the context is made: weights must not change inside.
    """
    forwards = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and _is_low_density(module.weight, mask := module.weight != 0):
            forwards[module] = _sparse_forward(module.weight.detach()[mask], mask, module.bias)
    return replaced_forwards(forwards)


def skip_zeros(model: nn.Module) -> AbstractContextManager[None]:
    """Context in which matrices of low density multiply by their nonzeros alone, but get gradients of all entries.

    Where the zeros are is looked up when the context is made: weights must not change inside.
    """
    forwards = {}
    for module in model.modules():
        if not (isinstance(module, nn.Linear) and has_parallel_kernel(module.weight)):
            continue  # before anything is computed on a GPU
        if _is_low_density(module.weight, mask := module.weight != 0):
            pattern = NonzeroPattern.from_mask(mask)
            forwards[module] = partial(dense_gradient_linear, weight=module.weight, pattern=pattern, bias=module.bias)
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
