"""What work leaves behind in memory."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable


def growth(work: Callable[[], object], times: int) -> int:
    """By how many bytes Python's memory grows when work is done again and again, after it was done once."""
    work()
    tracemalloc.start()
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(times):
        work()
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return after - before
