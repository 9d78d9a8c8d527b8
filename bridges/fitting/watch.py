"""A watch over the other processes of a run: when one of them dies or fails, those that need it end with a message."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import torch

BEAT_SECONDS = 0.5
"""Each process counts up a number at this interval, which the others read."""
SILENT_AFTER_ERROR = 6.0
"""Seconds without a beat after which a process is taken for dead, once a sum over processes has failed."""
SILENT = 300.0
"""Seconds without a beat after which a process is taken for dead where no sum has failed; a call that keeps Python from
running threads, such as the compilation of a kernel, may stop the beats of a running process for a while."""
GRACE = 10.0
"""Seconds that a process may go on waiting in a sum for one that is dead or has failed, before its watch ends it."""
FINISHED = "finished"

_runs = count()


class ProcessLost(RuntimeError):
    """Another process of the run has died or failed; the message says which one."""


class Watch:
    """Exchanges signs of life with the other processes of a run, through the store at which they met.

    One thread talks to the store. Its calls do not return where the process that holds the store is stopped, so
    a second thread compares clocks, and ends this process where its main thread waits in a sum for a process that is
    gone: that wait cannot be interrupted, and may last for half an hour.
    """

    def __init__(self, rank: int, world_size: int):
        from torch.distributed import distributed_c10d  # some builds of torch have none

        shared_store: Any = distributed_c10d._get_default_store()
        self._rank, self._world_size, self._run = rank, world_size, next(_runs)
        self._others = frozenset(range(world_size)) - {rank}
        self._beats: dict[int, tuple[int, float]] = {}
        """The last number of every other process that has begun to count, and when it was first read here."""
        self._ends: dict[int, str] = {}
        """How other processes ended: `FINISHED`, or a message for those that need them."""
        self._answered = time.monotonic()
        """When the store was last asked and answered."""
        self._waiting_since: float | None = None
        """When the main thread entered the sum that it is in."""
        self._end: str | None = None
        """How this process ended, for the others."""
        self._stopped = threading.Event()
        self._talker = threading.Thread(target=self._talk, args=(shared_store,), name="signs of life", daemon=True)
        self._timer = threading.Thread(target=self._compare_clocks, name="watch over processes", daemon=True)
        self._talker.start()
        self._timer.start()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """For a sum over processes: an error that comes from the end of another process becomes ProcessLost.

        Raises ProcessLost at once if another process has failed already. Ends this process if it waits inside, for
        longer than `GRACE`, for one that has failed or is taken for dead.
        """
        if message := self._failure():
            raise ProcessLost(message)
        self._waiting_since = time.monotonic()
        try:
            yield
        except torch.OutOfMemoryError:  # an error of this process alone
            raise
        except RuntimeError as error:
            self._waiting_since = None
            until = time.monotonic() + 2 * SILENT_AFTER_ERROR
            while time.monotonic() < until:
                time.sleep(BEAT_SECONDS)
                if message := self._failure() or self._silence(SILENT_AFTER_ERROR):
                    raise ProcessLost(message) from error
            raise
        finally:
            self._waiting_since = None

    def close(self, error: BaseException | None) -> None:
        """End the watch, and let the others know how this process ended, if the store answers within `GRACE`."""
        self._end = FINISHED if error is None else self._end_of(error)
        self._stopped.set()
        self._talker.join(GRACE)
        self._timer.join(GRACE)

    def _end_of(self, error: BaseException) -> str:
        if isinstance(error, ProcessLost):
            return str(error)  # the first cause, not what followed from it
        first_line = next(iter(str(error).splitlines()), "")[:500]
        return self._lost(self._rank, f"failed with {type(error).__name__}: {first_line}")

    # The thread that talks to the store.

    def _talk(self, shared_store: Any) -> None:
        store = None
        while True:
            stopped = self._stopped.is_set()
            with suppress(RuntimeError):  # the store is gone, which `_answered` shows
                if store is None:
                    # A connection of its own: a call that waits on a shared one would keep beats back.
                    store = shared_store.clone() if hasattr(shared_store, "clone") else shared_store
                self._exchange_beats(store)
                self._read_ends(store)
                if stopped and self._end is not None:
                    self._write_end(store, self._end)
            if stopped:
                return
            self._stopped.wait(BEAT_SECONDS)

    def _key(self, what: str, rank: int) -> str:
        return f"bridges/{self._run}/{what}/{rank}"

    def _exchange_beats(self, store: Any) -> None:
        now = time.monotonic()
        store.add(self._key("beat", self._rank), 1)
        for rank in self._others:
            beat = store.add(self._key("beat", rank), 0)
            if beat != self._beats.get(rank, (0, now))[0]:
                self._beats[rank] = beat, now
        self._answered = now

    def _read_ends(self, store: Any) -> None:
        for rank in self._others - self._ends.keys():
            if store.check([self._key("end", rank)]):
                self._ends[rank] = store.get(self._key("end", rank)).decode()

    def _write_end(self, store: Any, end: str) -> None:
        store.set(self._key("end", self._rank), end)
        # The store ends with the process that holds it, so that one gives the others time to read.
        until = time.monotonic() + 4 * BEAT_SECONDS
        while end != FINISHED and time.monotonic() < until and self._ends.keys() != self._others:
            time.sleep(BEAT_SECONDS / 2)
            self._read_ends(store)

    # What the other threads read.

    def _failure(self) -> str | None:
        """The message of another process that has failed."""
        return next((end for _, end in sorted(self._ends.items()) if end != FINISHED), None)

    def _silence(self, silent: float) -> str | None:
        """A message if the store has not answered, or another process has not counted, for so many seconds."""
        answered = self._answered
        if time.monotonic() - answered > silent:
            return self._lost(0, "or the launcher, which holds the store of the run, has stopped responding")
        for rank, (_, seen) in sorted(self._beats.items()):
            # By the clock of the readings, so that a pause of this process does not count as one of the others.
            if rank not in self._ends and answered - seen > silent:
                return self._lost(rank, "has stopped responding: it was probably killed, or ran out of memory")
        return None

    def _lost(self, rank: int, what: str) -> str:
        return (
            f"process {rank} of {self._world_size} (counted from 0) {what}; the others cannot go on without it. "
            "Read its error output, then start all of them again: with resume=True a run goes on from its last "
            "checkpoint"
        )

    # The thread that compares clocks.

    def _compare_clocks(self) -> None:
        lost_since = None
        while not self._stopped.wait(BEAT_SECONDS):
            now, waiting_since = time.monotonic(), self._waiting_since
            message = self._failure() or self._silence(SILENT)
            if message is None:
                lost_since = None
                continue
            lost_since = now if lost_since is None else lost_since
            if waiting_since is not None and now - max(lost_since, waiting_since) > GRACE:
                self._end_here(message)
                return

    def _end_here(self, message: str) -> None:
        """End this process, whose main thread waits for one that is gone and cannot be interrupted."""
        print(f"bridges: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
