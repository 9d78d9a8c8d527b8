"""The order of a circuit's nodes within their columns, so that few edges cross."""

from __future__ import annotations

from collections.abc import Sequence

SWEEPS = 12
"""Passes over the columns, one in each direction by turns; orders of circuits settle after a few."""


def column_orders(columns: Sequence[int], edges: Sequence[tuple[int, int]]) -> list[float]:
    """Each node's height in its column, from 0 to 1, by repeated barycentres (Sugiyama, Tagawa and Toda 1981).

    `columns`: the column of every node; `edges`: pairs of node indices. A node moves to the mean height of its
    neighbours in earlier columns, then in later ones, and so on; the orders with the fewest crossings are kept. Nodes
    of equal means stay as they stood.

    >>> column_orders([0, 0, 1, 1], [(0, 3), (1, 2)])
    [0.25, 0.75, 0.75, 0.25]
    """
    members: dict[int, list[int]] = {}
    for node, column in enumerate(columns):
        members.setdefault(column, []).append(node)
    before: list[list[int]] = [[] for _ in columns]
    after: list[list[int]] = [[] for _ in columns]
    for source, target in edges:
        before[target].append(source)
        after[source].append(target)
    heights = _heights(members, len(columns))
    best, fewest = heights, crossings(columns, edges, heights)
    for sweep in range(SWEEPS):
        neighbours, order = (before, sorted(members)) if sweep % 2 == 0 else (after, sorted(members, reverse=True))
        for column in order:
            members[column].sort(key=lambda node: _barycentre(node, neighbours, heights))
            heights = _heights(members, len(columns))
        if (found := crossings(columns, edges, heights)) < fewest:
            best, fewest = heights, found
    return best


def crossings(columns: Sequence[int], edges: Sequence[tuple[int, int]], heights: Sequence[float]) -> int:
    """How many pairs of edges between the same two columns cross.

    >>> crossings([0, 0, 1, 1], [(0, 3), (1, 2)], [0.25, 0.75, 0.25, 0.75])
    1
    """
    between: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for source, target in edges:
        between.setdefault((columns[source], columns[target]), []).append((heights[source], heights[target]))
    return sum(_inversions([end for _, end in sorted(pairs)]) for pairs in between.values())


def _inversions(values: list[float]) -> int:
    """Pairs that stand in the wrong order, by merge sort: of 5,000 edges there are 12 million pairs."""
    if len(values) < 2:
        return 0
    left, right = values[: len(values) // 2], values[len(values) // 2 :]
    count = _inversions(left) + _inversions(right)
    left, right = sorted(left), sorted(right)
    i = 0
    for value in right:
        while i < len(left) and left[i] <= value:
            i += 1
        count += len(left) - i
    return count


def _heights(members: dict[int, list[int]], n_nodes: int) -> list[float]:
    heights = [0.5] * n_nodes
    for nodes in members.values():
        for i, node in enumerate(nodes):
            heights[node] = (i + 0.5) / len(nodes)
    return heights


def _barycentre(node: int, neighbours: list[list[int]], heights: list[float]) -> float:
    """The mean height of a node's neighbours; its own where it has none."""
    found = [heights[other] for other in neighbours[node]]
    return sum(found) / len(found) if found else heights[node]
