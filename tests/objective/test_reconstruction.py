import pytest
import torch

from bridges.objective.reconstruction import SpreadSums


def test_a_stream_that_does_not_vary_has_no_nmse_in_any_dtype():
    """In float64 sums of equal rows leave rounding errors, which are no variance."""
    sums = SpreadSums.zeros(1, 3)
    sums.add(0, torch.tensor([[0.1, -7.3, 1e5]]).expand(1001, 3))
    assert sums.variance().tolist() == [0]
    sums.add(0, torch.tensor([[0.1, -7.3, 1.001e5]]))
    assert sums.variance().item() == pytest.approx(1001 / 1002 * 100**2, rel=1e-6)
