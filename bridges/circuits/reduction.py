"""Leaving out what is not needed: ever shorter runs of a list are taken out for as long as the rest suffices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def reduced(items: Sequence[T], suffices: Callable[[list[T]], bool], trials: int) -> list[T]:
    """The items that are left when runs of half of them, a quarter, an eighth and at last single ones are taken out.

    A run stays out where the others suffice without it (delta debugging, Zeller and Hildebrandt 2002). Of n items of
    which m are needed this takes about 2 m log2(n / m) + m trials, where taking out one by one takes n. `suffices` is
    asked at most `trials` times, never of an empty list; where none are left, the rest stays. Items that come first are
    tried first.

    >>> reduced(range(100), lambda kept: {3, 70} <= set(kept), trials=50)
    [3, 70]
    """
    kept = list(items)
    size = len(kept) // 2
    while size >= 1:
        i = 0
        while i < len(kept) and trials > 0:
            fewer = kept[:i] + kept[i + size :]
            if fewer and suffices(fewer):
                kept = fewer
            else:
                i += size
            trials -= 1
        size //= 2
    return kept
