"""The benchmark of circuit sizes: its means by hand, and a run at tiny size that a second call continues."""

import json
import math
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

import bridges

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_circuit_size.py"
TINY = ("--tasks", "for_while", "--targets", "0.8", "1e-9", "--steps", "2", "--pairs", "8", "--text-tokens", "256")


@pytest.fixture(scope="module")
def bench():
    spec = spec_from_file_location("bench_circuit_size", SCRIPT)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and named tuples look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def sizes_of(bench, by_task):
    return {
        task: {name: {"0.15": {"nodes": n, "edges": n, "loss": 0.1}} for name, n in zip(bench.SERIES, of, strict=True)}
        for task, of in by_task.items()
    }


def test_means_are_geometric_over_the_tasks_that_all_four_reach(bench):
    sizes = sizes_of(bench, {"a": (2, 3, 8, 9, None, 5), "b": (8, 3, 8, 9, 7, None), "c": (100, 3, None, 9, 7, None)})
    assert bench.reached_by_all(sizes, 0.15) == ["a", "b"]
    assert bench.mean_sizes(sizes, "sparse, masks", 0.15) == (2, pytest.approx(4), pytest.approx(4))
    assert bench.mean_sizes(sizes, "shuffled labels", 0.15) == (2, pytest.approx(7), pytest.approx(7))
    assert bench.mean_sizes(sizes, "permuted weights", 0.15)[0] == 1
    assert bench.geometric_mean([0, 9]) == pytest.approx(3) and math.isnan(bench.geometric_mean([]))
    lines = bench.table(sizes, [0.05, 0.15]).splitlines()
    assert lines[2] == "| sparse, masks | none reached | 4, 4 (2) |" and len(lines) == 2 + len(bench.SERIES)


def test_a_figure_is_drawn_also_where_nothing_is_reached(bench, tmp_path):
    unreached = {name: {"0.15": {"nodes": None, "edges": None, "loss": 0.6}} for name in bench.SERIES}
    bench.draw({"a": unreached}, [0.05, 0.15], tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_continued_and_drawn_and_refuses_the_sizes_of_another(bench, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    shape = {"vocab_size": 1024, "n_layer": 1, "d_model": 32, "block_size": 128, "bos_token_id": 0, "eos_token_id": 0}
    for name in ("sparse", "twin"):
        bridges.SparseTransformer(bridges.SparseConfig(**shape)).save_pretrained(tmp_path / name)
    arguments = ["--sparse", str(tmp_path / "sparse"), "--twin", str(tmp_path / "twin"), *TINY]
    arguments += ["--out", str(tmp_path / "out")]
    bench.main(arguments)
    printed = capsys.readouterr().out
    state = json.loads((tmp_path / "out/sizes.json").read_text())
    assert state["sizes"]["for_while"].keys() == bench.SERIES.keys()
    for of_series in state["sizes"]["for_while"].values():
        assert of_series["1e-09"]["nodes"] is None and of_series["1e-09"]["loss"] > 1e-9
    assert (tmp_path / "out/sizes.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(bridges, "prune", None)  # a second search would fail
    bench.main(arguments)
    assert capsys.readouterr().out == printed
    with pytest.raises(ValueError, match="holds sizes of other models or settings"):
        bench.main([*arguments, "--steps", "3"])
