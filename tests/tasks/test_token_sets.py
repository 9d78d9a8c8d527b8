"""Sets of tokens that rows share, against one row of tokens each."""

import pytest
import torch

from bridges.tasks.token_sets import FEW_TOKENS, TokenSets


def random_rows(n_sets, width, n=9, seed=0):
    """Rows with one of a few sets each, some filled with -1, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    sets = torch.stack([torch.randperm(50, generator=generator)[:width] for _ in range(n_sets)])
    sets[1, width // 2 :] = -1
    sets[2] = -1
    return sets[torch.randint(n_sets, (n,), generator=generator)]


@pytest.mark.parametrize("width", [1, 3, FEW_TOKENS, FEW_TOKENS + 1, 40])
def test_sums_are_those_of_a_loop_over_rows_and_tokens(width):
    rows = random_rows(5, width)
    values = torch.rand(9, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = [sum(values[i, t].item() for t in row if t >= 0) for i, row in enumerate(rows.tolist())]
    assert TokenSets.of_rows(rows).sums(values).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("width", [1, 3, 40])
def test_each_set_is_held_once_and_rows_come_back_as_they_were(width):
    rows = random_rows(5, width)
    sets = TokenSets.of_rows(rows)
    assert torch.equal(sets.filled(), rows)
    assert len(sets.distinct) == len({tuple(row) for row in rows.tolist()})
    some = torch.tensor([7, 0, 7])
    assert torch.equal(sets.take(some).filled(), rows[some])


def test_tuples_of_different_lengths_are_filled():
    sets = TokenSets.of_tuples([(4, 5, 6), (7,), (4, 5, 6)])
    assert sets.filled().tolist() == [[4, 5, 6], [7, -1, -1], [4, 5, 6]] and len(sets.distinct) == 2
    assert torch.equal(TokenSets.of_rows(sets.filled()).distinct, sets.distinct)
