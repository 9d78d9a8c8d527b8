"""Which of the channels at all locations are tried: those of largest predicted effect, in a total that is limited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bridges.channels.attribution import Effects, Location, top_channels

LOCATIONS_TRIED_IN_FULL = 10
"""With more locations (a site's read or its stream), the edits made are not `CANDIDATES` at each, but this many times
`CANDIDATES` in total, spread over all of them; and sets of several channels are tried at this many locations."""


def spread(candidates: Mapping[Location, Sequence[int]], effects: Effects, most: int) -> list[tuple[Location, int]]:
    """At most `most` of the candidates of all locations: all of them, where there are no more.

    Else half are those of largest predicted effect, wherever they are; the others are the first candidates of every
    location, then the second, since predictions at one depth may be worse than at another.
    """
    everything = [(location, channel) for location, channels in candidates.items() for channel in channels]
    if len(everything) <= most:
        return everything

    def predicted(one: tuple[Location, int]) -> float:
        return effects[one[0]][one[1]].item()

    largest = sorted(everything, key=predicted, reverse=True)
    rank = {(at, channel): n for at, channels in candidates.items() for n, channel in enumerate(channels)}
    evenly = sorted(largest, key=rank.__getitem__)
    return list(dict.fromkeys([*largest[: most // 2], *evenly]))[:most]


def top_of_each(sources: Sequence[tuple[Effects, int]], location: Location) -> list[int]:
    """The channels of largest effect at a location, so many from each source."""
    return list(dict.fromkeys(channel for effects, n in sources for channel in top_channels(effects[location], n)))


def effects_on_both(dense: Effects, sparse: Effects) -> Effects:
    """The geometric mean of the effects on both models; 0 where either is negative."""
    return {at: (effect.clamp(min=0) * sparse[at].clamp(min=0)).sqrt() for at, effect in dense.items()}
