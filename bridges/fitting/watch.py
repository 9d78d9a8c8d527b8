"""A watch over the other processes of a run: when one of them dies, all end with a message and none waits forever."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

BEAT_SECONDS = 0.5
"""Each process counts up a number at this interval, which the others look at."""
SILENT_AFTER_ERROR = 6.0
"""Seconds without a beat after which a process is taken for dead, once a sum over processes has failed."""
SILENT = 300.0
"""Seconds without a beat after which a process is taken for dead whatever happens here; a call that keeps Python from
running threads, such as the compilation of a kernel, may silence a living one for a while."""
GRACE = 10.0
"""Seconds that a process has to end by itself, by an error of its own, before its watch ends it."""
FINISHED = "finished"

_runs = count()


class ProcessLost(RuntimeError):
    """Another process of the run has died or failed; the message says which one."""


class Watch:
    """Tells the other processes that this one lives, and learns from them, through the store that they met at.

    A thread does both, so that it goes on where the main thread waits in a sum for a process that is gone. There, with
    GPUs, nothing else would end the wait for many minutes.
    """

    def __init__(self, rank: int, world_size: int):
        from torch.distributed import distributed_c10d  # some builds of torch have none

        store: Any = distributed_c10d._get_default_store()
        # A connection of its own: a call that waits on a shared one would keep beats back.
        self._store = store.clone() if hasattr(store, "clone") else store
        self._rank, self._world_size, self._run = rank, world_size, next(_runs)
        now = time.monotonic()
        self._beats = {other: (0, now) for other in range(world_size) if other != rank}
        """The last number of every other process, and when it was first seen here."""
        self._ends: dict[int, str] = {}
        """How other processes ended: `FINISHED`, or a message for whoever waits for them."""
        self._answered = now
        """When the store last answered."""
        self._stopped, self._explains = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch over processes", daemon=True)
        self._thread.start()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Inside, an error that comes from the end of another process becomes ProcessLost."""
        try:
            yield
        except RuntimeError as error:
            self._explains.set()
            until = time.monotonic() + 2 * SILENT_AFTER_ERROR
            while time.monotonic() < until:
                if message := self._message(SILENT_AFTER_ERROR):
                    raise ProcessLost(message) from error
                time.sleep(BEAT_SECONDS / 2)
            raise

    def close(self, error: BaseException | None) -> None:
        """End the watch, and tell the others how this process ended."""
        self._stopped.set()
        self._thread.join(GRACE)
        with suppress(RuntimeError):  # the process that holds the store may be the one that died
            self._store.set(self._key("end", self._rank), FINISHED if error is None else self._end_of(error))
            # The store ends with the process that holds it, so that one gives the others time to read.
            until = time.monotonic() + 4 * BEAT_SECONDS
            while error is not None and time.monotonic() < until and self._ends.keys() != self._beats.keys():
                time.sleep(BEAT_SECONDS / 2)
                self._read_ends()

    def _end_of(self, error: BaseException) -> str:
        if isinstance(error, ProcessLost):
            return str(error)  # the first cause, not what followed from it
        first_line = next(iter(str(error).splitlines()), "")[:500]
        return _lost(self._rank, self._world_size, f"failed with {type(error).__name__}: {first_line}")

    def _key(self, what: str, rank: int) -> str:
        return f"bridges/{self._run}/{what}/{rank}"

    def _watch(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            with suppress(RuntimeError):  # seen by `_answered`
                self._store.add(self._key("beat", self._rank), 1)
                self._read_beats()
                self._read_ends()
                self._answered = time.monotonic()
            if self._message(SILENT) and not self._explains.is_set() and not self._stopped.wait(GRACE):
                if not self._explains.is_set():
                    self._end_here()
                return

    def _read_beats(self) -> None:
        for rank, (number, _) in list(self._beats.items()):
            beat = self._store.add(self._key("beat", rank), 0)
            if beat != number:
                self._beats[rank] = beat, time.monotonic()

    def _read_ends(self) -> None:
        for rank in self._beats.keys() - self._ends.keys():
            if self._store.check([self._key("end", rank)]):
                self._ends[rank] = self._store.get(self._key("end", rank)).decode()

    def _message(self, silent: float) -> str | None:
        """What to tell the user if another process has failed, or gave no sign for so many seconds."""
        for _, end in sorted(self._ends.items()):
            if end != FINISHED:
                return end
        now = time.monotonic()
        if now - self._answered > silent:
            return _lost(0, self._world_size, "no longer answers, or the launcher that holds the run's addresses")
        for rank, (_, seen) in sorted(self._beats.items()):
            if rank not in self._ends and now - seen > silent:
                return _lost(rank, self._world_size, "has ended without a word: it was killed, or ran out of memory")
        return None

    def _end_here(self) -> None:
        """End this process, whose main thread waits for one that is gone and cannot be interrupted."""
        print(f"bridges: {self._message(SILENT)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)


def _lost(rank: int, world_size: int, what: str) -> str:
    return (
        f"process {rank} of {world_size} (counted from 0) {what}; the others cannot go on without it. "
        "See what it printed, and start all of them again: with resume=True a run goes on from its last checkpoint"
    )
