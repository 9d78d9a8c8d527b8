"""Time to quality on the bundled pair: gradient steps alone, the closed form alone, both.

`python benchmarks/bench_fit.py [--seconds 600 --heldout-rows 64 --fractions 0.25 1]`

Each way is a whole call of `fit` with the settings of `bridges demo` (but a decoder that attributes equally), given
several budgets of processor time, which other jobs on the machine change less than wall time: its schedule ends with
its budget, so that every row is what one gets in that time. Work is chosen by a pace that is measured first; a row
gives the seconds that it then took, the evaluation left out. Figures are means over sites on held-out rows.

Gradient steps alone, and both, each have a learning rate of their own: the best of a geometric list on rows of the
training split that no fit sees, at the smallest budget; the list goes on where the best is at its end. Both spend half
of the time on the closed form, but for no more tokens than the demo's.

Last comes how long each takes to the quality of gradient steps alone after --seconds, the mean of both KLs: the time of
the shortest run that reaches it, where budgets are halved until one does not. Nothing is interpolated.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

import bridges
from bridges.config import DEFAULT_SEQ_LEN
from bridges.demo import HELDOUT_DOCUMENTS, SETTINGS, demo_rows

RATES = (2e-3, 8e-3, 3.2e-2)
RATIO, MORE_RATES = 4, 2
"""How far a list of rates that ends with its best goes on, and how often."""
FRACTIONS = (1 / 4, 1 / 2, 1.0)
"""Budgets, of --seconds, where none are given."""
ROWS_PER_SECOND, MOST_ROWS, VALIDATION_ROWS = 120, 16_000, 2
"""Training rows to choose from for every second of the longest budget, and at most; the last are set aside."""
PROBES = {"steps": (10, 20), "tokens": (2000, 8000)}
"""Counts whose times give the pace; from ten steps on a fit looks for its best state equally often."""
FEWEST_TOKENS = 256
FIGURES = ("nmse_encode", "nmse_decode", "kl_dense_to_sparse", "kl_sparse_to_dense")
SMALL = {"READ_SCALE_TOKENS": 512, "STANDARDIZATION_TOKENS": 1024}
"""Constants of `fit` for what gradient steps alone need besides: R, which no figure here depends on, and the streams'
means and deviations, which a closed form gathers anyway."""
SHORT, SHORT_SECONDS = {"SELECTION_TOKENS": 256}, 100
"""As well, where the longest budget is under so many seconds, of which the choice of the best state would take most."""


class Models(NamedTuple):
    """Two models, and rows to fit on, to choose a learning rate on, and to report."""

    dense: torch.nn.Module
    sparse: torch.nn.Module
    train: Tensor
    validation: Tensor
    heldout: Tensor


class Point(NamedTuple):
    """One fit."""

    budget: float
    seconds: float
    settings: dict
    mean: dict[str, float]
    """The report's means on held-out rows."""

    @property
    def kl(self) -> float:
        """The mean of both KLs, nats per token."""
        return mean_kl(self.mean)


def mean_kl(mean: dict[str, float]) -> float:
    """The mean of both KLs."""
    return (mean["kl_dense_to_sparse"] + mean["kl_sparse_to_dense"]) / 2


def timed_fit(models: Models, **settings):
    """(the bridges, seconds of processor time) of one fit, whose own report is of a single row."""
    config = SETTINGS.with_settings({"progress": False, "decoder_attribution": "equal", "eval_tokens": 1, **settings})
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of poor sites, which the figures show
        found = bridges.fit(models.dense, models.sparse, models.train, eval_data=models.validation[:1], config=config)
    return found, time.process_time() - started


def measured(models: Models, found, rows: Tensor) -> dict[str, float]:
    """The report's means on some rows."""
    options = {"kl_tokens": rows.numel(), "progress": False}
    return bridges.evaluate(models.dense, models.sparse, found, rows, **options).mean


class Pace(NamedTuple):
    """Seconds of a fit with n of something: start + n * each."""

    start: float
    each: float

    @classmethod
    def of(cls, models: Models, counts: Sequence[int], settings: Callable[[int], dict]) -> "Pace":
        """From the times at two counts."""
        few, many = (timed_fit(models, **settings(n))[1] for n in counts)
        each = (many - few) / (counts[1] - counts[0])
        if each <= 0:
            raise SystemExit("the machine is too busy to time a part; run this alone")
        return cls(few - counts[0] * each, each)

    def count(self, seconds: float) -> int:
        """How many fit into a budget; at least one."""
        return max(1, round((seconds - self.start) / self.each))


def ways(steps: Pace, tokens: Pace, most: int) -> dict[str, Callable[[float], dict]]:
    """{way: the settings of `fit` for a budget in seconds}."""

    def tokens_in(seconds: float, limit: int) -> int:
        return min(max(tokens.count(seconds), FEWEST_TOKENS), limit)

    def both(seconds: float) -> dict:
        few = tokens_in(seconds / 2, min(most, SETTINGS.closed_form_tokens_for(0)))
        left = seconds - tokens.start - few * tokens.each - steps.start
        return {"closed_form_tokens": few, "steps": max(1, round(left / steps.each))}

    return {
        "gradient steps alone": lambda seconds: {"closed_form": False, "steps": steps.count(seconds)},
        "closed form alone": lambda seconds: {"closed_form_tokens": tokens_in(seconds, most), "steps": 0},
        "both": both,
    }


def best_rate(name: str, try_rate: Callable[[float], float], rates: Sequence[float]) -> float:
    """The rate of the smallest value, of a list that grows where its best stands at an end; printed."""
    tried = {rate: try_rate(rate) for rate in rates}
    for _ in range(MORE_RATES):
        best = min(tried, key=tried.__getitem__)
        if best not in (min(tried), max(tried)):
            break
        rate = best * RATIO if best == max(tried) else best / RATIO
        tried[rate] = try_rate(rate)
    best = min(tried, key=tried.__getitem__)
    values = ", ".join(f"{rate:.2g}: {tried[rate]:.3f}" for rate in sorted(tried))
    end = "" if best not in (min(tried), max(tried)) else ", at the end of the list"
    print(f"- {name}: mean KL on rows set aside by learning rate {values}; chosen {best:.2g}{end}", flush=True)
    return best


def point(models: Models, budget: float, settings: dict) -> Point:
    """One fit and its held-out figures."""
    found, seconds = timed_fit(models, **settings)
    return Point(budget, seconds, settings, measured(models, found, models.heldout))


def halved(run: Callable[[float], Point], shortest: Point, target: float) -> list[Point]:
    """Runs of half the budget, and again, until one misses the target or takes hardly less time."""
    found: list[Point] = []
    while shortest.kl <= target:
        found.append(run(shortest.budget / 2))
        if found[-1].seconds > 0.8 * shortest.seconds:
            break
        shortest = found[-1]
    return found


def seconds_to(points: Sequence[Point], target: float) -> float | None:
    """The time of the shortest run that reaches a mean KL; None if none does."""
    return min((one.seconds for one in points if one.kl <= target), default=None)


def row(name: str, one: Point) -> str:
    """A line of the table."""
    settings = one.settings
    cells = [name, f"{settings['lr']:.2g}" if "lr" in settings else "-", settings["steps"]]
    cells += [settings.get("closed_form_tokens", 0), f"{one.seconds:.1f}", *(f"{one.mean[f]:.3f}" for f in FIGURES)]
    return f"| {' | '.join(map(str, [*cells, f'{one.kl:.3f}']))} |"


def compare(models: Models, seconds: float, rates: Sequence[float] = RATES, fractions: Sequence[float] = FRACTIONS):
    """Measure and print everything; {way: its points}."""
    timed_fit(models, steps=1, closed_form_tokens=64)  # kernels compile, files are read
    steps = Pace.of(models, PROBES["steps"], lambda n: {"steps": n, "closed_form": False})
    tokens = Pace.of(models, PROBES["tokens"], lambda n: {"steps": 0, "closed_form_tokens": n})
    settings_of = ways(steps, tokens, models.train.numel() // 2)
    chosen: dict[str, dict] = {"closed form alone": {}}
    print(f"{fractions[0] * seconds:.1f} seconds for each learning rate:\n")
    for name in ("gradient steps alone", "both"):
        settings = settings_of[name](fractions[0] * seconds)

        def try_rate(rate, settings=settings):
            return mean_kl(measured(models, timed_fit(models, **settings, lr=rate)[0], models.validation))

        chosen[name] = {"lr": best_rate(name, try_rate, rates)}
    print(
        f"\n| {' | '.join(['', 'learning rate', 'steps', 'closed-form tokens', 'processor s', *FIGURES, 'mean KL'])} |"
    )
    print("|" + "---|" * 10)
    found: dict[str, list[Point]] = {}
    target = float("nan")
    for name, settings in settings_of.items():

        def run(budget, name=name, settings=settings):
            one = point(models, budget, {**settings(budget), **chosen[name]})
            print(row(name, one), flush=True)
            return one

        found[name] = [run(fraction * seconds) for fraction in fractions]
        if name == "gradient steps alone":
            target = found[name][-1].kl
        else:
            found[name] += halved(run, found[name][0], target)
    print_times(found, target)
    return found


def print_times(found: dict[str, list[Point]], target: float) -> None:
    """How long each way takes to the target."""
    reference = seconds_to(found["gradient steps alone"], target)
    assert reference is not None, "the target is the last of these"
    print(f"\n| to a mean KL of {target:.3f} | processor s | times faster |\n|---|---|---|")
    for name, points in found.items():
        taken = seconds_to(points, target)
        cells = ("not reached", "-") if taken is None else (f"{taken:.1f}", f"{reference / taken:.1f}")
        print(f"| {name} | {' | '.join(cells)} |")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=16.0, help="of the longest budget; 600 for a figure worth quoting"
    )
    parser.add_argument(
        "--fractions",
        type=float,
        nargs="+",
        default=FRACTIONS,
        help="budgets, of --seconds, growing; the first is that of every learning rate, too, the last 1",
    )
    parser.add_argument("--heldout-rows", type=int, default=4, help="rows of 128 tokens that figures are measured on")
    args = parser.parse_args(arguments)
    vars(import_module("bridges.fit")).update(SMALL | (SHORT if args.seconds < SHORT_SECONDS else {}))
    pair = bridges.load_pair()
    n_rows = min(MOST_ROWS, round(ROWS_PER_SECOND * args.seconds))
    rows = demo_rows(pair, "train", n_rows, DEFAULT_SEQ_LEN, SETTINGS.seed)[: n_rows + VALIDATION_ROWS]
    heldout = demo_rows(pair, "heldout", HELDOUT_DOCUMENTS, DEFAULT_SEQ_LEN, SETTINGS.seed)[: args.heldout_rows]
    compare(
        Models(pair.dense, pair.sparse, rows[:-VALIDATION_ROWS], rows[-VALIDATION_ROWS:], heldout),
        args.seconds,
        fractions=args.fractions,
    )


if __name__ == "__main__":
    main()
