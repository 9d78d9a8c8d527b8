"""Watches of several processes, as threads of this one; real processes that die: tests/fit/test_ranks.py."""

import threading
import time
from contextlib import contextmanager
from itertools import repeat

import pytest
import torch
import torch.distributed as dist

from bridges.fitting import watch
from bridges.fitting.processes import ProcessGroup
from bridges.fitting.watch import ProcessLost, Watch

SHORT = {"BEAT_SECONDS": 0.05, "SILENT_AFTER_ERROR": 1.5, "SILENT": 2.0, "GRACE": 0.5}


class BlockableStore:
    """A store whose calls do not return while it is blocked, as where the process that holds it is stopped."""

    def __init__(self):
        self._store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        self._open, self.callers = threading.Event(), []
        self._open.set()

    def block(self):
        self._open.clear()

    def clone(self):
        return self._passed_on("clone", lambda: self)

    def __getattr__(self, name):
        return lambda *args: self._passed_on(name, getattr(self._store, name), *args)

    def _passed_on(self, name, call, *args):
        self.callers.append((name, threading.current_thread()))
        self._open.wait()
        return call(*args)


@pytest.fixture
def store(monkeypatch):
    """The store of the watches of a test, which run at short intervals."""
    store = BlockableStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(watch, "_runs", repeat(0))
    for name, seconds in SHORT.items():
        monkeypatch.setattr(watch, name, seconds)
    yield store
    store._open.set()


@pytest.fixture
def start(store, ended):
    """Starts the watches of some ranks out of three, and waits until they have read one another's beats."""
    found = []

    def begin(*ranks):
        found.extend(Watch(rank, 3) for rank in ranks)
        assert eventually(lambda: all(len(one._beats) == len(ranks) - 1 for one in found))
        return found

    yield begin
    for one in found:
        die(one)


@pytest.fixture
def ended(monkeypatch):
    """The ranks that their watches have ended, with the message."""
    found = {}
    monkeypatch.setattr(Watch, "_end_here", lambda self, message: found.update({self._rank: message}))
    return found


def eventually(condition, seconds=15):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def die(one):
    """What remains of a process that was killed: no more beats, and no word of how it ended."""
    one._stopped.set()


def failing_sum(one):
    """What a sum over processes does once a connection is gone."""
    with one.explaining():
        raise RuntimeError("connection closed by peer")


@contextmanager
def waiting(one):
    """A process whose main thread waits in a sum over processes, as with NCCL: without an error."""
    leave, inside = threading.Event(), threading.Event()

    def wait():
        with one.explaining():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        assert inside.wait(30)
        yield
    finally:
        leave.set()
        thread.join()


def test_the_others_learn_of_a_failure_by_its_first_cause(start):
    first, second, _ = start(0, 1, 2)
    second.close(OSError("the disk is full\nand more"))
    message = r"process 1 of 3 .* failed with OSError: the disk is full; the others"
    with pytest.raises(ProcessLost, match=message) as lost:
        failing_sum(first)
    assert first._end_of(lost.value) == str(lost.value)  # not "process 0 failed with ProcessLost"


def test_a_process_that_stops_beating_is_taken_for_dead_after_an_error(start):
    first, _, third = start(0, 1, 2)
    die(third)
    with pytest.raises(ProcessLost, match=r"process 2 of 3 .* has stopped responding"):
        failing_sum(first)


def test_a_failure_during_a_sum_explains_its_error(start):
    first, second, _ = start(0, 1, 2)
    with pytest.raises(ProcessLost, match=r"process 1 of 3 .* failed with OSError"), first.explaining():
        second.close(OSError("the disk is full"))
        raise RuntimeError("connection closed by peer")


def test_an_error_while_all_others_live_or_have_finished_stays_what_it_was(start):
    first, _, third = start(0, 1, 2)
    third.close(None)
    with pytest.raises(RuntimeError, match="connection closed by peer") as error:
        failing_sum(first)
    assert type(error.value) is RuntimeError


def test_a_lack_of_memory_is_an_error_of_this_process_alone(start):
    first, _, third = start(0, 1, 2)
    die(third)
    with pytest.raises(torch.OutOfMemoryError), first.explaining():
        raise torch.OutOfMemoryError("out of memory")


def test_a_process_that_has_not_begun_is_not_taken_for_dead(start, ended):
    first, _ = start(0, 1)
    with waiting(first):
        time.sleep(watch.SILENT + watch.GRACE + 0.5)
        assert not ended
        assert first._silence(watch.SILENT_AFTER_ERROR) is None


def test_a_wait_for_a_process_that_died_is_ended_though_no_sum_fails(start, ended):
    first, second, third = start(0, 1, 2)
    with second.explaining():
        pass  # a sum that has ended
    die(third)
    with waiting(first):
        assert eventually(lambda: ended)
        assert "process 2 of 3 (counted from 0) has stopped responding" in ended[0]
    assert eventually(lambda: second._silence(watch.SILENT))
    time.sleep(watch.GRACE + 0.5)
    assert ended.keys() == {0}  # the second one does not wait for the third


def test_a_wait_for_a_process_that_failed_is_ended_and_no_other_process_is(start, ended):
    first, second, third = start(0, 1, 2)
    with waiting(first):
        second.close(OSError("the disk is full"))
        assert eventually(lambda: ended)
        assert "process 1 of 3 (counted from 0) failed with OSError" in ended[0]
    time.sleep(watch.GRACE + 0.5)
    assert ended.keys() == {0}  # the third one is in a long evaluation, say, and learns of it at its next sum
    entered = False
    with pytest.raises(ProcessLost, match="process 1 of 3"), third.explaining():
        entered = True
    assert not entered


def test_waits_that_each_end_soon_do_not_add_up(start, ended):
    first, _, third = start(0, 1, 2)
    die(third)
    assert eventually(lambda: first._silence(watch.SILENT))
    until = time.monotonic() + 3 * watch.GRACE
    while time.monotonic() < until:
        with first.explaining():
            time.sleep(0.01)
    assert not ended


def test_a_wait_is_ended_where_the_store_does_not_answer(start, store, ended):
    first, *_ = start(0, 1, 2)
    store.block()
    with waiting(first):
        assert eventually(lambda: ended)
    assert "process 0 of 3 (counted from 0) or the launcher, which holds the store of the run" in ended[0]


def test_a_store_that_does_not_answer_holds_up_neither_start_nor_end(store, ended):
    store.block()
    begun = time.monotonic()
    one = Watch(1, 3)
    one.close(OSError("the disk is full"))
    assert time.monotonic() - begun < 20 * watch.GRACE
    assert {thread for _, thread in store.callers} == {one._talker}


def test_one_thread_alone_talks_to_the_store(start, store):
    first, *_ = start(0, 1, 2)
    first.close(OSError("the disk is full"))
    assert "set" in {name for name, _ in store.callers}
    assert threading.current_thread() not in {thread for _, thread in store.callers}


def test_accelerators_without_a_process_group_of_torch_have_no_watch(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    processes = ProcessGroup()
    processes.world_size = 2
    with processes:
        assert processes._watch is None
