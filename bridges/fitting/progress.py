"""What a run shows while it works, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import nan
from statistics import fmean

from bridges.fitting.gradients import StepLosses


def show_plan(text: str) -> None:
    """Print the plan of a run."""
    from rich.console import Console

    Console(stderr=True).print(text, highlight=False, soft_wrap=True)


@contextmanager
def step_bar(steps: int, done: int, shown: bool) -> Iterator[Callable[[StepLosses], None]]:
    """Show a bar over a run's steps, unless it is not to be `shown`; yields what each step's losses are given to."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, TextColumn("{task.fields[losses]}"), console=Console(stderr=True), disable=not shown
    ) as progress:
        task = progress.add_task("fit", total=steps, completed=done, losses="")
        yield lambda losses: progress.update(task, advance=1, losses=summary(losses))


def summary(losses: StepLosses) -> str:
    """A step's losses on one line, each a mean over its sites; both directions are divided by a slash."""
    nmse = f"{_mean(losses.nmse_encode):.2f}/{_mean(losses.nmse_decode):.2f}"
    kl = f"{_mean(losses.kl_dense_to_sparse):.2f}/{_mean(losses.kl_sparse_to_dense):.2f}"
    text = f"loss {losses.loss:.3f} nmse {nmse} kl {kl}"
    return text if losses.ce is None else f"{text} ce {losses.ce:.2f}"


def _mean(losses: Mapping[str, float]) -> float:
    """NaN where no site's target varies."""
    return fmean(losses.values()) if losses else nan
