"""The benchmark of joining tails, on a tiny model."""

from bench_tails import per_row
from pairs import gpt2

import bridges


def test_a_tail_is_timed_at_few_rows_and_at_four_times_as_many():
    taken = per_row(bridges.as_residual(gpt2()), rounds=1, rows=2, seq_len=8)
    assert list(taken) == ["2 rows", "8 rows"] and min(taken.values()) > 0
