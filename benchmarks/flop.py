"""Floating-point operations of a step's matrix products, and the rate of one large product: the measured ceiling.

`torch.utils.flop_counter` counts torch's products, attention by its whole square of scores. Those of the library's
kernels for nonzeros, which are no torch operations, are counted here: two for every nonzero and token, per product.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from bridges.ops.compiled import has_parallel_kernel

SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of both factors of the large product."""
PRODUCTS_OF_KERNELS = {"multiply": 1, "values_gradient": 1, "both_gradients": 2}
"""How many products each kernel of `bridges.ops.kernels` computes, and so which are counted."""


class Flop(NamedTuple):
    """Operations of the products of one run."""

    dense: int
    """Of torch's products."""
    nonzeros: int
    """Of the library's kernels that multiply nonzeros alone."""

    @property
    def total(self) -> int:
        """Of both."""
        return self.dense + self.nonzeros


def _attention(q, k, v, *args, out_shape=None, **kwargs) -> int:
    """Scores and the mean of values: two products of a query's by a key's number of tokens, in every head."""
    return 2 * 2 * prod(q) * k[-2]


def _attention_backward(grad, q, k, v, *args, out_shape=None, **kwargs) -> int:
    """The scores anew, and two products for the gradients of each."""
    return 5 * 2 * prod(q) * k[-2]


def _fused_attention() -> dict:
    """torch's counter does not know the kernels for CPUs."""
    name, aten = "_scaled_dot_product_flash_attention_for_cpu", torch.ops.aten
    if not hasattr(aten, name):
        return {}
    return {getattr(aten, name): _attention, getattr(aten, f"{name}_backward"): _attention_backward}


@contextmanager
def _count_kernels(add: Callable[[int], object]) -> Iterator[None]:
    """Inside, `add` gets the operations of every call of a kernel for nonzeros."""
    if not has_parallel_kernel(torch.empty(0)):
        yield
        return
    from bridges.ops import kernels

    plain = {name: getattr(kernels, name) for name in PRODUCTS_OF_KERNELS}

    def counted(name):
        def run(starts, *arrays):
            rows = next(array for array in arrays if array.ndim == 2)  # the tokens of the input or the gradient
            add(2 * PRODUCTS_OF_KERNELS[name] * int(starts[-1]) * len(rows))
            plain[name](starts, *arrays)

        return run

    try:
        for name in plain:
            setattr(kernels, name, counted(name))
        yield
    finally:
        for name, kernel in plain.items():
            setattr(kernels, name, kernel)


def count_flop(run: Callable[[], object]) -> Flop:
    """The operations of everything that `run` multiplies, backward passes too.

    >>> x = torch.ones(2, 3, requires_grad=True)
    >>> count_flop(lambda: (x @ torch.ones(3, 4)).sum().backward())
    Flop(dense=96, nonzeros=0)
    """
    nonzeros: list[int] = []
    counter = FlopCounterMode(display=False, custom_mapping=_fused_attention())
    with counter, _count_kernels(nonzeros.append):
        run()
    return Flop(counter.get_total_flops(), sum(nonzeros))


def large_product(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int | None = None):
    """(a function that computes one large product, its operations)."""
    size = size or SIZE[torch.device(device).type]
    left, right = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return lambda: left @ right, 2 * size**3


def ceiling_caption(device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Of which product, and at which precision, the ceiling is.

    >>> ceiling_caption()
    'Ceiling: one product of 2048 x 2048 matrices in float32 at the precision "highest", as in the steps.'
    """
    size, name = SIZE[torch.device(device).type], str(dtype).removeprefix("torch.")
    # torch's setting is of float32 alone.
    precision = f' at the precision "{torch.get_float32_matmul_precision()}"' if dtype == torch.float32 else ""
    return f"Ceiling: one product of {size} x {size} matrices in {name}{precision}, as in the steps."
