"""What other seeds find again, on the planted model with two ways to do the task."""

from dataclasses import replace

import pytest
from planted import planted_model, planted_pairs, planted_text

from bridges.circuits.circuit import Circuit
from bridges.circuits.controls import controls
from bridges.circuits.pruning import prune
from bridges.circuits.search import Search, TargetNotReached
from bridges.circuits.seeds import over_seeds
from bridges.circuits.settings import PruneConfig
from bridges.io.progress import Bar


def test_a_control_reports_sizes_overlap_and_union_over_as_many_circuits_as_there_are_seeds():
    model, fresh = planted_model(redundant=True), planted_pairs(64, seed=3)
    circuit = prune(model, planted_pairs(), text=planted_text(), steps=60, progress=False)
    circuit = replace(circuit, settings={**circuit.settings, "seeds": 3})
    found = controls(model, circuit, fresh, text=planted_text(), progress=False)["other_seed"]
    others = [Search(model, fresh, circuit.means, PruneConfig(steps=60, seeds=3)).run(seed, Bar()) for seed in (1, 2)]
    a, b, c = ({f"{place}.{i}" for place, on in one.nodes.items() for i in on} for one in (circuit, *others))
    assert found["sizes"] == [len(a), len(b), len(c)] and found["nodes"] == len(b)
    assert found["union"] == len(a | b | c)
    expected = sum(len(x & y) / len(x | y) for x, y in ((a, b), (a, c), (b, c))) / 3
    assert found["overlap"] == pytest.approx(expected)


def test_a_seed_that_does_not_reach_the_target_has_no_size_and_no_part_in_the_overlap():
    circuit = Circuit("mine", {"0.attn.read": (3,), "final.read": (1, 2)}, [], {})
    other = replace(circuit, nodes={"final.read": (2, 5, 6)})
    none = TargetNotReached("", 0.6)
    assert over_seeds(circuit, [none]) == {"sizes": [3, None], "overlap": None, "union": 3}
    assert over_seeds(circuit, [none, other]) == {"sizes": [3, None, 3], "overlap": 1 / 5, "union": 5}
