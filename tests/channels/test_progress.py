"""Bars of the long jobs: on standard error alone, and off by `progress=False`."""

import math

import pytest
from pairs import tokens, toy_task

from bridges.channels.constant_edits import constant_edits
from bridges.channels.find import find_channels
from bridges.channels.prompts import Channels
from bridges.channels.sweep import sweep

CHOSEN = Channels("1.attn", (3,), "residual")
TEXT = tokens(2, 6)
JOBS = {
    "find_channels": (
        lambda *pair, **options: find_channels(*pair, toy_task(), budget=math.inf, candidates=8, text=TEXT, **options),
        ["find_channels, toy: 6 pairs, 5 sites, 12 tokens of text", "predicting effects", "80 edits of one channel"],
    ),
    "sweep": (
        lambda *pair, **options: sweep(*pair, toy_task(rows=66), CHOSEN, (0.0, 1.0), text=TEXT, **options),
        ["sweep, toy: 2 pairs, 1 channel(s) at 1.attn, 2 strengths, 12 tokens", "52/52", "12/12", "side effects"],
    ),
    "constant_edits": (
        lambda *pair, **options: constant_edits(*pair, CHOSEN, toy_task(), **options),
        ["constant edits, toy", "6/6"],
    ),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_long_job_says_its_size_and_shows_bars_unless_it_is_told_not_to(pair, job, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run, said = JOBS[job]
    models = pair.dense.model, pair.sparse.model, pair.bridge_set
    result = run(*models)
    shown = capsys.readouterr()
    assert not shown.out
    for text in said:
        assert text in shown.err, text
    assert str(run(*models, progress=False)) == str(result)
    assert capsys.readouterr() == ("", "")
