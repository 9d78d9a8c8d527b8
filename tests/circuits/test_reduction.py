import random

import pytest

from bridges.circuits.reduction import reduced


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("m", [1, 3, 12])
def test_exactly_the_items_that_are_needed_are_left_in_their_order(n, m):
    needed = set(random.Random(n * m).sample(range(n), min(n, m)))
    asked = []

    def suffices(kept):
        asked.append(kept)
        return needed <= set(kept)

    assert reduced(range(n), suffices, 10_000) == sorted(needed)
    assert all(asked), "an empty list was asked of"
    if n == 1000:
        assert len(asked) < 40 * m


def test_of_two_that_do_the_same_the_first_goes():
    assert reduced([1, 2, 3, 4], lambda kept: 2 in kept or 4 in kept, 100) == [4]


def test_what_is_left_always_suffices_and_no_more_trials_are_made_than_allowed():
    rng = random.Random(0)
    for trials in (0, 1, 5, 30):
        count = 0

        def suffices(kept):
            nonlocal count
            count += 1
            return sum(kept) >= 900  # items share the work, so what is needed depends on what is left

        items = [rng.randint(1, 40) for _ in range(100)]
        left = reduced(items, suffices, trials)
        assert sum(left) >= 900 and count <= trials
        if not trials:
            assert left == items


def test_nothing_is_asked_of_an_empty_list():
    assert reduced([], lambda kept: True, 10) == []
