"""Circuit sizes in the sparse model and its dense-weight twin: python benchmarks/bench_circuit_size.py

Per task and target loss: nodes and edges of the circuit in both models, by masks and by attribution. Beside them what
masks find in the sparse model for shuffled labels, judged on the pairs that train them, and in a copy of it with
permuted weights. The twin is trained by
`python examples/pretrain_sparse.py --config configs/dense_twin.toml --run runs/dense_twin`.

Means are geometric, over the tasks on which both models reach the target by both methods; an edgeless circuit counts as
one edge. Every size is written to sizes.json once it is known, and the same command continues from there; sizes.png is
edges against the target.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import bridges
from bridges.circuits.controls import permuted_weights, shuffled_labels
from bridges.circuits.dense_twin import load_dense_twin, text_ce
from bridges.circuits.search import found_size, search_result
from bridges.circuits.task_loss import Calibration, Presented, accuracy, answer_differences
from bridges.circuits.text import mean_text
from bridges.io.files import read_json, replacing, write_json
from bridges.io.fingerprint import fingerprint
from bridges.sparsity.projection import density
from bridges.tasks.pairs import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SOLVED, SOLVED_PAIRS = 0.9, 64
"""Part of its prompts that both models must answer for a task to be measured, unless it is named."""
N_TASKS = 6


class Series(NamedTuple):
    """One line of the table and of the figure."""

    model: str
    method: str
    shuffled: bool = False
    color: str = "#555555"


COMPARED = {
    "sparse, masks": Series("sparse", "masks", color="#1f6f8b"),
    "sparse, attribution": Series("sparse", "attribution", color="#7fb7c9"),
    "dense twin, masks": Series("twin", "masks", color="#d1603d"),
    "dense twin, attribution": Series("twin", "attribution", color="#e8b09a"),
}
CONTROLS = {
    "shuffled labels": Series("sparse", "masks", shuffled=True),
    "permuted weights": Series("permuted", "masks", color="#9a7fb0"),
}
SERIES = COMPARED | CONTROLS

Sizes = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""Task, series, target loss: nodes, edges, loss, seconds."""


class Bench:
    """The models, what is known so far, and where it is written."""

    def __init__(self, args: argparse.Namespace):
        bundled = bridges.load_pair()
        self.tokenizer, self.args = bundled.tokenizer, args
        sparse = bridges.as_residual(args.sparse).model if args.sparse else bundled.sparse
        assert isinstance(sparse, bridges.SparseTransformer)
        twin = load_dense_twin(args.twin, sparse, self.tokenizer)
        self.models = {"sparse": sparse, "twin": twin, "permuted": permuted_weights(sparse)}
        self.settings = {"steps": args.steps, "pairs_per_step": args.pairs_per_step, "text_tokens": args.text_tokens}
        self.file = Path(args.out).expanduser() / "sizes.json"
        self.text = mean_text(sparse, None, self.tokenizer, args.text_tokens, 0)
        self.state = self._opened()

    def _opened(self) -> dict[str, Any]:
        models = {
            name: {"fingerprint": fingerprint(model), "density": density(model), "text_ce": text_ce(model, self.text)}
            for name, model in self.models.items()
        }
        fresh = {"settings": {**self.settings, "pairs": self.args.pairs}, "models": models, "solved": {}, "sizes": {}}
        if not self.file.is_file():
            return fresh
        state = read_json(self.file)
        same = [{name: one["fingerprint"] for name, one in s["models"].items()} for s in (state, fresh)]
        if state["settings"] != fresh["settings"] or same[0] != same[1]:
            raise ValueError(f"out={self.args.out!r} holds sizes of other models or settings; pass another folder")
        return state

    def tasks(self) -> list[str]:
        """Those named; with "all" those that both models solve, else the first few of these."""
        if self.args.tasks and self.args.tasks != ["all"]:
            return self.args.tasks
        solved = (task for task in TASKS if min(self.solved(task).values()) >= SOLVED)
        return list(solved if self.args.tasks else islice(solved, N_TASKS))

    def solved(self, task: str) -> dict[str, float]:
        """The part of its prompts that each model answers right."""
        if task not in self.state["solved"]:
            prompts = Presented.of(bridges.task_pairs(task, self.tokenizer, SOLVED_PAIRS, seed=1), "cpu")
            with torch.no_grad():
                self.state["solved"][task] = {
                    name: accuracy(answer_differences(self.models[name], prompts), prompts.sign, Calibration())
                    for name in ("sparse", "twin")
                }
        return self.state["solved"][task]

    def measure(self, task: str) -> None:
        """All sizes of a task that are not known yet, each written once it is."""
        pairs = bridges.task_pairs(task, self.tokenizer, self.args.pairs)
        text = torch.cat([ids for ids, _ in self.text])
        for name, series in SERIES.items():
            known = self.state["sizes"].setdefault(task, {}).setdefault(name, {})
            unreached: dict[str, Any] | None = None
            for target in sorted(self.args.targets, reverse=True):
                if str(target) not in known:
                    started = perf_counter()
                    # Where even all nodes stay over a target, no lower one is searched for.
                    size = unreached or found_size(
                        search_result(
                            lambda series=series, target=target: bridges.prune(
                                self.models[series.model],
                                shuffled_labels(pairs) if series.shuffled else pairs,
                                tokenizer=self.tokenizer,
                                text=text,
                                method=series.method,
                                target_loss=target,
                                **({"judge_share": 0} if series.shuffled else {}),
                                progress=False,
                                **self.settings,
                            )
                        )
                    )
                    known[str(target)] = {**size, "seconds": perf_counter() - started}
                    write_json(self.file, self.state)
                found = known[str(target)]
                unreached = {key: found[key] for key in ("nodes", "edges", "loss")} if found["nodes"] is None else None
                print(line(task, name, target, found), file=sys.stderr)  # of a search that goes on for an hour


def line(task: str, name: str, target: float, size: Mapping[str, Any]) -> str:
    """One size in words."""
    if size["nodes"] is None:
        return f"{task}: {name} at {target}: not reached, {size['loss']:.3f}"
    return f"{task}: {name} at {target}: {size['nodes']} nodes, {size['edges']} edges ({size['seconds']:.0f} s)"


def reached_by_all(sizes: Sizes, target: float, names: Sequence[str] = tuple(COMPARED)) -> list[str]:
    """The tasks on which every series of `names` has a circuit."""
    return [
        task
        for task, of_task in sizes.items()
        if all(of_task.get(name, {}).get(str(target), {}).get("nodes") is not None for name in names)
    ]


def geometric_mean(values: Sequence[int]) -> float:
    """NaN of nothing; a 0 counts as 1.

    >>> round(geometric_mean([0, 4, 16]), 6)
    4.0
    """
    return math.exp(sum(math.log(max(1, value)) for value in values) / len(values)) if values else math.nan


def mean_sizes(sizes: Sizes, name: str, target: float) -> tuple[int, float, float]:
    """How many tasks count, and the geometric means of nodes and edges: of a control, over the tasks it reaches."""
    tasks = reached_by_all(sizes, target, tuple(COMPARED) if name in COMPARED else (name,))
    found = [sizes[task][name][str(target)] for task in tasks]
    return len(tasks), geometric_mean([one["nodes"] for one in found]), geometric_mean([one["edges"] for one in found])


def table(sizes: Sizes, targets: Sequence[float]) -> str:
    """Markdown; in a cell, geometric means of nodes and edges, and over how many tasks."""
    rows = [f"| | {' | '.join(f'{target:g} nats: nodes, edges (tasks)' for target in targets)} |"]
    rows.append("|---" * (len(targets) + 1) + "|")
    for name in SERIES:
        cells = (mean_sizes(sizes, name, target) for target in targets)
        words = (f"{nodes:.0f}, {edges:.0f} ({n})" if n else "none reached" for n, nodes, edges in cells)
        rows.append(f"| {name} | {' | '.join(words)} |")
    return "\n".join(rows)


def draw(sizes: Sizes, targets: Sequence[float], path: Path) -> None:
    """Edges against the target loss, both logarithmic: means as lines, single tasks as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    for name, series in SERIES.items():
        _draw_series(axes, sizes, targets, name, series)
    axes.set(xscale="log", yscale="log", xlabel="target loss, nats (0.69 is guessing)", ylabel="edges of the circuit")
    largest = max((size["edges"] or 1 for t in sizes.values() for s in t.values() for size in s.values()), default=1)
    axes.set_ylim(0.8, 2 * max(10, largest))
    axes.set_xticks([*targets, math.log(2)], [*map(str, targets), "ln 2"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"Geometric means over the tasks that all four reach, of {len(sizes)}", fontsize=10)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_series(axes: Axes, sizes: Sizes, targets: Sequence[float], name: str, series: Series) -> None:
    means = [mean_sizes(sizes, name, target) for target in targets]
    counts = ", ".join(str(n) for n, _, _ in means)
    style = "-" if name in COMPARED else "--"
    edges = [edges for _, _, edges in means]
    axes.plot(targets, edges, style, marker="o", color=series.color, label=f"{name} (tasks: {counts})")
    for of_task in sizes.values():
        for target in targets:
            size = of_task.get(name, {}).get(str(target), {"nodes": None})
            if size["nodes"] is not None:
                axes.plot(target, max(1, size["edges"]), ".", color=series.color, alpha=0.35, markersize=4)
    failed = [of_task[name][str(max(targets))] for of_task in sizes.values() if name in of_task and name in CONTROLS]
    losses = [size["loss"] for size in failed if size["nodes"] is None]
    if losses:
        label = f"{name}: best loss where {max(targets):g} is not reached ({len(losses)} tasks)"
        axes.axvline(sum(losses) / len(losses), linestyle=":", color=series.color, label=label)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparse", default="", help="a sparse model's folder; default: the bundled one")
    parser.add_argument("--twin", default="runs/dense_twin/sparse", help="the folder of the model with dense weights")
    parser.add_argument(
        "--tasks", nargs="+", help=f"names, or all; default: the first {N_TASKS} that both models solve"
    )
    parser.add_argument("--targets", nargs="+", type=float, default=[0.05, 0.15, 0.3], help="target losses, nats")
    parser.add_argument("--steps", type=int, default=80, help="training steps of masks")
    parser.add_argument("--pairs", type=int, default=96, help="pairs of prompts, a quarter of them to judge on")
    parser.add_argument("--pairs-per-step", type=int, default=16)
    parser.add_argument("--text-tokens", type=int, default=8192, help="tokens that nodes' means are taken over")
    parser.add_argument("--out", default="runs/circuit_size")
    args = parser.parse_args(arguments)
    bench = Bench(args)
    for name, model in bench.state["models"].items():
        print(f"{name}: density {model['density']:.4f}, cross-entropy on text {model['text_ce']:.3f}")
    tasks = bench.tasks()
    for task in tasks:
        bench.measure(task)
    sizes = {task: bench.state["sizes"][task] for task in tasks}
    draw(sizes, sorted(args.targets), bench.file.with_name("sizes.png"))
    print(f"\n{table(sizes, sorted(args.targets))}")


if __name__ == "__main__":
    main()
