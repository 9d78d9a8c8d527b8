"""Named tensors that add up over batches, and are reduced over processes in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

SumsT = TypeVar("SumsT", bound="Sums")
Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over processes."""


def no_reduce(tensor: Tensor) -> Tensor:
    """The `Reduce` of a single process."""
    return tensor


def reduce_together(tensors: Sequence[Tensor], reduce: Reduce) -> list[Tensor]:
    """Every tensor summed over processes, all of them in one reduction; they must share dtype and device."""
    total = reduce(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = total.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@dataclass
class Sums:
    """Base of a dataclass whose fields are tensors of one dtype and device that add up over batches and processes."""

    def __add__(self: SumsT, other: SumsT) -> SumsT:
        return type(self)(*(one + two for one, two in zip(self.tensors(), other.tensors(), strict=True)))

    def tensors(self) -> list[Tensor]:
        """The fields' own tensors, in order."""
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def device(self) -> torch.device:
        """The device of all of them."""
        return self.tensors()[0].device

    def cpu(self: SumsT) -> SumsT:
        """The sums on the CPU, by one transfer."""
        return type(self)(*reduce_together(self.tensors(), lambda together: together.cpu()))

    def reduced(self: SumsT, reduce: Reduce) -> SumsT:
        """The sums over all processes, by one reduction."""
        return type(self)(*reduce_together(self.tensors(), reduce))


def zeros_per_site(kind: type[SumsT], n_sites: int) -> SumsT:
    """Sums over no token, with one number per site in every field, in float64."""
    return kind(*(torch.zeros(n_sites, dtype=torch.float64) for _ in fields(kind)))


def add_up(parts: Iterable[SumsT]) -> SumsT:
    """The sum of one or more parts."""
    first, *others = parts
    return sum(others, start=first)
