"""Hybrid passes that change sides several times, in training: what they cost and what they improve.

`python benchmarks/bench_paths.py [--steps 400 --closed-form-tokens 50000 --rows 64]`

The bundled pair with the settings of `bridges demo`, whose steps and closed-form tokens are those that the defaults
here cut short. First the processor time of a step with and without such a pass, steps alternating in one run: the mean
over --timed steps, since each draws a site and a path of its own. Then fits, on the same rows in the same order:
without such passes; with them and the same number of steps; and without them, but for as many steps as take as long.

Held-out figures are means over the sites, and over --paths random paths by how often they change sides; a path with one
change is a KL of the usual objective. KLs in nats per token. `fit` keeps the best state by the usual objective on rows
set aside, which is after the step named.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from statistics import fmean

import torch
from bench_fit import SHORT
from step_pair import steps
from torch import Tensor

import bridges
from bridges.bridge_report import BridgeReport
from bridges.config import DEFAULT_SEQ_LEN, FitConfig
from bridges.demo import HELDOUT_DOCUMENTS, SETTINGS, demo_rows

DOCUMENTS = 2000
SHORT_STEPS = 100
"""Under so many, the choice of the best state would take most of the time, and is made on fewer tokens."""


def step_ms(dense, sparse, config: FitConfig, weights: Sequence[float], n: int) -> dict[float, float]:
    """{path weight: mean milliseconds of processor time of a step}."""
    assert config.seq_len is not None
    options = {"batch": config.batch_size, "seq": config.seq_len, "sites_per_step": config.sites_per_step}
    with ExitStack() as stack:
        functions = {
            weight: stack.enter_context(steps(dense, sparse, None, "frozen", path_weight=weight, **options))["ours"]
            for weight in weights
        }
        times: dict[float, list[float]] = {weight: [] for weight in weights}
        for _ in range(n + 1):  # the first one compiles
            for weight, step in functions.items():
                started = time.process_time()
                step()
                times[weight].append(1e3 * (time.process_time() - started))
    return {weight: fmean(taken[1:]) for weight, taken in times.items()}


def path_kls(report: BridgeReport) -> dict[int, float]:
    """{number of changes: mean KL of the paths with so many}."""
    changes = sorted({path.changes for path in report.paths})
    return {n: fmean(path.kl for path in report.paths if path.changes == n) for n in changes}


def row(label: str, n_steps: int, ms: float, report: BridgeReport) -> dict[str, str]:
    """A line of the table, by its columns."""
    mean, by_changes = report.mean, path_kls(report)
    single = (mean["kl_dense_to_sparse"] + mean["kl_sparse_to_dense"]) / 2
    found = {"fit": label, "steps": f"{n_steps}", "their processor s": f"{n_steps * ms / 1e3:.1f}"}
    found |= {name: f"{mean[name]:.3f}" for name in ("nmse_encode", "nmse_decode")}
    found |= {"KL: one change": f"{single:.3f}"} | {f"{n} changes": f"{kl:.3f}" for n, kl in by_changes.items()}
    found["2 or more"] = f"{fmean(path.kl for path in report.paths):.3f}"
    return found | {"state after step": "-" if report.selection is None else f"{report.selection['step']}"}


def compare(
    pair: tuple, train: Tensor, heldout: Tensor, config: FitConfig, weights: Sequence[float], n_paths: int, timed: int
) -> tuple[Mapping[float, float], dict[str, BridgeReport]]:
    """Measure and print: the milliseconds of a step by path weight, and the report of every fit."""
    dense, sparse = pair[:2]
    ms = step_ms(dense, sparse, config, [0.0, *weights], timed)
    print("| path_weight | ms a step | over a step without |\n|---|---|---|")
    for weight, taken in ms.items():
        print(f"| {weight:g} | {taken:.0f} | {taken / ms[0.0]:.2f} |")
    fits: list[tuple[str, float, int]] = [("without paths", 0.0, config.steps)]
    for weight in weights:
        fits.append((f"path_weight {weight:g}", weight, config.steps))
        as_long = round(config.steps * ms[weight] / ms[0.0])
        fits.append((f"without paths, as long as {weight:g}", 0.0, as_long))
    reports = {}
    for label, weight, n_steps in fits:
        settings = config.with_settings({"path_weight": weight, "steps": n_steps, "eval_tokens": 1})
        found = bridges.fit(dense, sparse, train, eval_data=heldout[:1], config=settings)
        options = {"paths": n_paths, "kl_tokens": heldout.numel(), "progress": False}
        reports[label] = bridges.evaluate(dense, sparse, found, heldout, **options)
        line = row(label, n_steps, ms[weight], reports[label])
        if len(reports) == 1:
            print(f"\n| {' | '.join(line)} |\n|{'---|' * len(line)}")
        print(f"| {' | '.join(line.values())} |", flush=True)
    return ms, reports


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--closed-form-tokens", type=int, default=8000)
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0], help="path_weight, each over 0")
    parser.add_argument("--paths", type=int, default=12, help="held-out paths of two and more changes")
    parser.add_argument("--rows", type=int, default=4, help="held-out rows of 128 tokens")
    parser.add_argument("--timed", type=int, default=8, help="steps that are timed")
    parser.add_argument("--seed", type=int, default=SETTINGS.seed)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    vars(import_module("bridges.fit")).update(SHORT if args.steps < SHORT_STEPS else {})
    pair = bridges.load_pair()
    settings = {"steps": args.steps, "closed_form_tokens": args.closed_form_tokens, "seed": args.seed}
    config = SETTINGS.with_settings({"progress": False, **settings})
    train = demo_rows(pair, "train", DOCUMENTS, DEFAULT_SEQ_LEN, SETTINGS.seed)
    heldout = demo_rows(pair, "heldout", HELDOUT_DOCUMENTS, DEFAULT_SEQ_LEN, SETTINGS.seed)[: args.rows]
    compare(pair, train, heldout, config, args.weights, args.paths, args.timed)


if __name__ == "__main__":
    main()
