"""How much of a circuit other seeds find again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from bridges.circuits.circuit import Circuit
from bridges.circuits.search import TargetNotReached


def over_seeds(circuit: Circuit, others: Sequence[Circuit | TargetNotReached]) -> dict[str, Any]:
    """Compare a circuit with those of other seeds, which may not have reached the target.

    Returns:
        `sizes`: the nodes of the circuit, then of every other, None where there is none; `overlap`: nodes in common
        over nodes of both (Jaccard), mean over all pairs of circuits, None if there is no other; `union`: how many
        nodes any of them has.

    >>> one, two = (Circuit("mine", {"final.read": nodes}, [], {}) for nodes in ((1, 2, 3), (2, 3, 4)))
    >>> over_seeds(one, [two])
    {'sizes': [3, 3], 'overlap': 0.5, 'union': 4}
    """
    found = [circuit, *(one for one in others if isinstance(one, Circuit))]
    nodes = [{(place, i) for place, indices in one.nodes.items() for i in indices} for one in found]
    overlaps = [len(one & other) / max(1, len(one | other)) for one, other in combinations(nodes, 2)]
    return {
        "sizes": [circuit.n_nodes, *(one.n_nodes if isinstance(one, Circuit) else None for one in others)],
        "overlap": fmean(overlaps) if overlaps else None,
        "union": len(set().union(*nodes)),
    }
