from itertools import combinations, permutations

import pytest
import torch

from bridges.views.layout import column_orders, crossings


def naive_crossings(columns, edges, heights):
    """Every pair of edges between the same columns, one by one."""
    count = 0
    for (a, b), (c, d) in combinations(edges, 2):
        if (columns[a], columns[b]) == (columns[c], columns[d]):
            count += (heights[a] - heights[c]) * (heights[b] - heights[d]) < 0
    return count


def random_graph(seed, n=14, n_edges=30, n_columns=4):
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(n_columns, (n,), generator=generator).sort().values.tolist()
    ends = torch.randint(n, (n_edges, 2), generator=generator).tolist()
    return columns, [(min(e), max(e)) for e in ends if columns[e[0]] != columns[e[1]]]


@pytest.mark.parametrize("seed", range(8))
def test_crossings_equal_those_counted_pair_by_pair(seed):
    columns, edges = random_graph(seed)
    heights = torch.rand(len(columns), generator=torch.Generator().manual_seed(seed)).tolist()
    assert crossings(columns, edges, heights) == naive_crossings(columns, edges, heights)
    level = [round(height, 1) for height in heights]  # edges that share a height do not cross
    assert crossings(columns, edges, level) == naive_crossings(columns, edges, level)


def test_the_order_never_crosses_more_than_the_one_it_began_with():
    for seed in range(20):
        columns, edges = random_graph(seed)
        given = column_orders(columns, [])
        assert crossings(columns, edges, column_orders(columns, edges)) <= crossings(columns, edges, given)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_parallel_chains_are_untangled_whatever_order_they_come_in(order):
    columns, edges = [0, 0, 0, 1, 1, 1, 2, 2, 2], []
    edges = [(i, 3 + order[i]) for i in range(3)] + [(3 + order[i], 6 + i) for i in range(3)]
    assert crossings(columns, edges, column_orders(columns, edges)) == 0


def test_heights_divide_a_column_evenly_and_nothing_is_no_graph():
    assert column_orders([0, 1, 1, 1, 1], []) == [0.5, 0.125, 0.375, 0.625, 0.875]
    assert column_orders([], []) == []
