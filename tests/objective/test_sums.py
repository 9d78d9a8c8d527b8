from dataclasses import dataclass

import torch
from torch import Tensor

from bridges.objective.sums import Sums, add_up, reduce_together


@dataclass
class Two(Sums):
    total: Tensor
    table: Tensor


def two(seed):
    generator = torch.Generator().manual_seed(seed)
    return Two(torch.rand((), generator=generator), torch.rand(2, 3, generator=generator))


def test_sums_add_field_by_field():
    one, other = two(0), two(1)
    found = one + other
    assert isinstance(found, Two)
    assert torch.equal(found.total, one.total + other.total) and torch.equal(found.table, one.table + other.table)
    total = add_up(iter([one, other, one]))
    assert torch.equal(total.table, one.table + other.table + one.table)


def test_all_fields_are_summed_over_processes_by_one_reduction_in_their_shapes():
    one, other, calls = two(0), two(1), []

    def reduce(tensor):
        """What a process holding `one` gets where the second holds `other`."""
        calls.append(tensor)
        return tensor + torch.cat([t.flatten() for t in other.tensors()])

    found = one.reduced(reduce)
    assert len(calls) == 1
    assert torch.equal(found.total, one.total + other.total) and torch.equal(found.table, one.table + other.table)


def test_tensors_of_any_shape_come_back_in_order():
    tensors = [torch.tensor(1.0), torch.zeros(0, 4), torch.arange(6.0).view(2, 3)]
    for one, found in zip(tensors, reduce_together(tensors, lambda flat: 3 * flat), strict=True):
        assert torch.equal(found, 3 * one)
