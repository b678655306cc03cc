"""Balance of regularisation images: vectors, and the loop that the formula stands for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.index import balanced_repeats


@pytest.mark.parametrize(
    ("own", "wanted", "expected"),
    [
        ([1, 1, 1, 1], 4, [1, 1, 1, 1]),
        ([1, 1, 1, 1], 2, [1, 1, 0, 0]),
        ([1, 1, 1], 5, [2, 2, 1]),
        ([1, 1, 1], 9, [3, 3, 3]),
        ([2, 3], 4, [2, 3]),
        ([2, 3, 4], 4, [2, 3, 0]),
        ([2, 3], 8, [4, 4]),
        ([10], 3, [10]),
        ([1], 0, [0]),
        ([], 7, []),
    ],
)
def test_vectors(own: list[int], wanted: int, expected: list[int]):
    """Surplus images are not used, the last one taken keeps its repeats, and missing ones are added in turn."""
    assert balanced_repeats(own, wanted) == expected


@given(st.lists(st.integers(1, 5), max_size=12), st.integers(0, 80))
def test_repeats_are_those_of_the_loop(own: list[int], wanted: int):
    """Taking images one by one, round after round, until there are enough gives the same repeats."""
    expected, total, first_round = [0] * len(own), 0, True
    while own and total < wanted:
        for place, count in enumerate(own):
            if total >= wanted:
                break
            more = count if first_round else 1
            expected[place] += more
            total += more
        first_round = False
    assert balanced_repeats(own, wanted) == expected
