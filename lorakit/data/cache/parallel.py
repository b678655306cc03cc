"""Work in other threads, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_AT_ONCE = 32
"""Items that a thread of `map_chunked` takes at once."""


def map_prefetch(pool: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """The results for the items, in their order; at most `ahead` items are taken before their results are."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def map_chunked(pool: Executor, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """The results for the items, in their order, for work that is mostly done before it begins.

    To hand a thread one item takes longer than to look up what is known of it, so each takes several.
    """
    chunks = [items[start : start + _AT_ONCE] for start in range(0, len(items), _AT_ONCE)]
    for results in pool.map(lambda chunk: [function(item) for item in chunk], chunks):
        yield from results
