"""Work in threads: results keep the order of what they are of."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lorakit.data.cache.parallel import map_chunked


@pytest.mark.parametrize("count", [0, 1, 32, 33, 100])
def test_chunks_keep_the_order(count: int) -> None:
    """Each item has its result, in the items' order, although the first take longest."""

    def squared(item: int) -> int:
        time.sleep(0.01 if item < 3 else 0)
        return item * item

    with ThreadPoolExecutor(3) as pool:
        assert list(map_chunked(pool, squared, range(count))) == [item * item for item in range(count)]


def test_error_in_a_chunk_is_raised() -> None:
    """What goes wrong in a thread is raised where the results are taken."""
    with ThreadPoolExecutor(2) as pool, pytest.raises(ZeroDivisionError):
        list(map_chunked(pool, lambda item: 1 // item, range(40)))
