"""Watches of several processes, as threads of this one; real processes that die: tests/fit/test_ranks.py."""

import time
from itertools import repeat

import pytest
import torch.distributed as dist

from bridges.fitting import watch
from bridges.fitting.watch import ProcessLost, Watch


@pytest.fixture
def watches(monkeypatch):
    """Three watches that meet at one store, at short intervals."""
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(watch, "_runs", repeat(0))
    for name, factor in {"BEAT_SECONDS": 50, "SILENT_AFTER_ERROR": 10, "SILENT": 50, "GRACE": 50}.items():
        monkeypatch.setattr(watch, name, getattr(watch, name) / factor)
    found = [Watch(rank, 3) for rank in range(3)]
    yield found
    for one in found:
        one._stopped.set()


def failing_sum(one):
    """What a sum over processes does once a connection is gone."""
    with one.explaining():
        raise RuntimeError("connection closed by peer")


def test_a_failure_is_told_to_all_the_others_by_its_first_cause(watches):
    watches[1].close(OSError("the disk is full\nand more"))
    with pytest.raises(
        ProcessLost, match=r"process 1 of 3 .* failed with OSError: the disk is full; the others"
    ) as lost:
        failing_sum(watches[0])
    assert watches[0]._end_of(lost.value) == str(lost.value)  # not "process 0 failed with ProcessLost"


def test_a_process_that_stops_beating_is_taken_for_dead_after_an_error(watches):
    watches[2]._stopped.set()
    with pytest.raises(ProcessLost, match=r"process 2 of 3 .* has ended without a word"):
        failing_sum(watches[0])


def test_an_error_while_all_others_live_or_have_finished_stays_what_it_was(watches):
    watches[2].close(None)
    with pytest.raises(RuntimeError, match="connection closed by peer") as error:
        failing_sum(watches[0])
    assert type(error.value) is RuntimeError


@pytest.mark.parametrize("finishes", [True, False])
def test_a_process_that_waits_for_one_that_failed_is_ended_unless_it_ends_by_itself(watches, monkeypatch, finishes):
    ended = []
    monkeypatch.setattr(Watch, "_end_here", lambda self: ended.append(self._rank))
    watches[1].close(OSError("the disk is full"))
    if finishes:
        watches[0].close(OSError("the disk is full"))
    time.sleep(4 * watch.GRACE)
    assert set(ended) == ({2} if finishes else {0, 2})
