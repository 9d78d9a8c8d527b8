import io
import re
import sys
import threading

import pytest

from bridges.io import progress
from bridges.io.progress import announce, progress_bar, tracked


class Terminal(io.StringIO):
    """Text that takes itself for a terminal."""

    def isatty(self):
        return True


def as_terminal(monkeypatch):
    """Make standard error a terminal of 120 columns; not a fixture, after which pytest sets it anew."""
    for name, value in {"TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def plain(text):
    """Without control codes."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_a_bar_shows_what_is_done_of_what_on_standard_error_alone(capsys):
    with progress_bar("measuring", 4) as bar:
        bar.advance()
        bar.advance(2, note="KL [0.5]")
    shown = capsys.readouterr()
    assert "measuring" in shown.err and "3/4" in shown.err and "KL [0.5]" in shown.err and not shown.out


def test_a_bar_begins_at_what_an_earlier_run_has_done(capsys):
    with progress_bar("fit", 10, done=7) as bar:
        bar.advance()
    assert "8/10" in capsys.readouterr().err


@pytest.mark.parametrize("total", [None, 3])
def test_a_bar_that_is_not_shown_prints_nothing(capsys, total):
    with progress_bar("measuring", total, shown=False) as bar:
        bar.advance(note="x")
    assert list(tracked(range(3), "squares", shown=False)) == [0, 1, 2]
    announce("a long job", shown=False)
    assert capsys.readouterr() == ("", "") and not progress._displays


@pytest.mark.parametrize(("items", "counted"), [([5, 6], "2/2"), ((i for i in (5, 6)), "2/?")])
def test_a_tracked_loop_yields_its_items_and_counts_them(capsys, items, counted):
    assert list(tracked(items, "squares")) == [5, 6]
    assert counted in capsys.readouterr().err


def test_a_nested_bar_and_text_share_the_display_of_the_outer_one(monkeypatch):
    terminal = as_terminal(monkeypatch)
    with progress_bar("outer", 2) as outer:
        for inner in tracked(range(3), "inner"):
            announce(f"at [b]{inner}")
        outer.advance(2)
    lines = [line.strip() for line in plain(terminal.getvalue()).splitlines()]
    assert [f"at [b]{i}" for i in range(3)] == [line for line in lines if line.startswith("at ")]
    last = [line for line in lines if line][-2:]
    assert "outer" in last[0] and "2/2" in last[0] and "inner" in last[1] and "3/3" in last[1]
    assert not progress._displays


def test_bars_of_two_threads_end_in_any_order(monkeypatch):
    terminal = as_terminal(monkeypatch)
    opened, close = threading.Event(), threading.Event()

    def other():
        with progress_bar("other", 1) as bar:
            opened.set()
            close.wait()
            bar.advance()

    thread = threading.Thread(target=other)
    with progress_bar("first", 1) as bar:
        thread.start()
        opened.wait()
        bar.advance()
    assert progress._displays
    close.set()
    thread.join()
    assert not progress._displays and "first" in terminal.getvalue() and "other" in terminal.getvalue()


def test_an_error_inside_ends_the_display(monkeypatch):
    terminal = as_terminal(monkeypatch)
    with pytest.raises(KeyError), progress_bar("failing", 2):
        raise KeyError
    assert not progress._displays and "0/2" in plain(terminal.getvalue())


def test_a_loop_that_is_left_early_ends_the_display(monkeypatch):
    as_terminal(monkeypatch)
    for _ in tracked(range(3), "left"):
        break
    assert not progress._displays


def test_what_is_printed_meanwhile_stays_on_standard_output(monkeypatch, capsys):
    """A file may read it."""
    terminal = as_terminal(monkeypatch)
    with progress_bar("measuring", 1):
        print("a figure")
    assert capsys.readouterr().out == "a figure\n" and "a figure" not in terminal.getvalue()
