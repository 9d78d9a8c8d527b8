"""Amounts as people read them: durations, counts, bytes."""

from __future__ import annotations


def duration(seconds: int | float) -> str:
    """Seconds, minutes or hours.

    >>> duration(0.2), duration(42), duration(600), duration(9000)
    ('under 1 s', '42 s', '10 min', '2.5 h')
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 99 * 60 else f"{seconds / 3600:.1f} h"


def about(seconds: int | float) -> str:
    """An estimate of a time.

    >>> about(0.2), about(42)
    ('under 1 s', 'about 42 s')
    """
    return duration(seconds) if seconds < 1 else f"about {duration(seconds)}"


def count(value: int | float) -> str:
    """A count to three digits.

    >>> count(950), count(1_534_000), count(2.5e12)
    ('950', '1.53M', '2.5 T')
    """
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if size > 1e6 else f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def memory(n_bytes: int | float) -> str:
    """Bytes as MiB or GiB.

    >>> memory(3e6), memory(5e9)
    ('3 MiB', '4.7 GiB')
    """
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
