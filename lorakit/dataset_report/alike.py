"""Images that are equal, or nearly so."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from attrs import frozen

from lorakit.data.cache.file_cache import FileStatCache
from lorakit.data.cache.parallel import map_chunked
from lorakit.data.images.perceptual_hash import has_perceptual_hash, near_pairs
from lorakit.data.index import Example, default_workers
from lorakit.data.review import equal_images
from lorakit.errors import DataError

log = logging.getLogger(__name__)


@frozen
class AlikeImages:
    """What images of a dataset look alike."""

    equal: tuple[tuple[Path, ...], ...]
    """Files with the same content, in groups."""
    nearly_equal: tuple[tuple[Path, ...], ...] | None
    """Images that look nearly the same, in groups, one of each group of equal files; None if not looked for."""
    damaged: tuple[str, ...]
    """What is wrong with images that cannot be decoded; empty where none had to be."""


def find_alike(examples: Sequence[Example], memo: FileStatCache, workers: int | None = None) -> AlikeImages:
    """Compare all images with each other; the hashes that this takes are computed once, and then remembered."""
    equal = equal_images(examples, memo)
    if not has_perceptual_hash():
        return AlikeImages(tuple(map(tuple, equal)), None, ())
    copies = {path for group in equal for path in group[1:]}
    files = [path for path in dict.fromkeys(example.image for example in examples) if path not in copies]
    log.info("comparing %d images", len(files))
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        outcomes = dict(zip(files, map_chunked(pool, lambda path: _hash(path, memo), files), strict=True))
    hashes = {path: outcome for path, outcome in outcomes.items() if isinstance(outcome, str)}
    damaged = tuple(str(outcome) for outcome in outcomes.values() if isinstance(outcome, DataError))
    return AlikeImages(tuple(map(tuple, equal)), tuple(_groups(hashes)), damaged)


def _hash(path: Path, memo: FileStatCache) -> str | DataError:
    try:
        return memo.perceptual_hash(path)
    except DataError as error:
        return error


def _groups(hashes: dict[Path, str]) -> list[tuple[Path, ...]]:
    """The files whose hashes are near, each group with all that are near to any of its members."""
    files = list(hashes)
    parent = list(range(len(files)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for first, second, _ in near_pairs(list(hashes.values())):
        parent[root(second)] = root(first)
    groups: dict[int, list[Path]] = {}
    for place, path in enumerate(files):
        groups.setdefault(root(place), []).append(path)
    return [tuple(group) for group in groups.values() if len(group) > 1]
