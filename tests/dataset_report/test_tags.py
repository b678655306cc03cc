"""Tags: counted by caption, and slips found among them without taking other words for slips."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from lorakit.config.datasets import SubsetConfig
from lorakit.dataset_report.tags import TagCount, count_tags, misspellings, tags_of


@pytest.mark.parametrize(
    ("caption", "keys", "tags"),
    [
        ("cat,  tabby cat , ,cat", {}, {"cat", "tabby cat"}),
        ("cat; dog", {"caption_separator": ";"}, {"cat", "dog"}),
        ("cat ||| dog, bird", {"keep_tokens_separator": "|||"}, {"cat", "dog", "bird"}),
        ("red;;;green, blue", {"secondary_separator": ";;;"}, {"red", "green", "blue"}),
        ("cat\ndog", {"enable_wildcard": True}, {"cat", "dog"}),
        ("", {}, set()),
    ],
)
def test_tags_of_captions(caption: str, keys: dict[str, object], tags: set[str]) -> None:
    """They are split as training splits them."""
    assert tags_of(caption, SubsetConfig(image_dir=Path(), **keys)) == tags  # type: ignore[arg-type]


def test_counts() -> None:
    """The most frequent first; a tag counts once for each caption."""
    assert count_tags([{"b", "a"}, {"b"}]) == [TagCount("b", 2), TagCount("a", 1)]


@pytest.mark.parametrize(
    ("rare", "frequent"),
    [
        ("long hiar", "long hair"),
        ("smiel", "smile"),
        ("blue eye", "blue eyes"),
        ("wiskers", "whiskers"),
        ("longhair", "long hair"),
        ("close_up", "close-up"),
        ("Lokking at viewer", "looking at viewer"),
    ],
)
def test_slips_are_found(rare: str, frequent: str) -> None:
    """A rare tag that is similar to a frequent one."""
    (slip,) = misspellings([TagCount(frequent, 20), TagCount("other", 9), TagCount(rare, 1)])
    assert (slip.tag, slip.count, slip.meant, slip.meant_count) == (rare, 1, frequent, 20)


@pytest.mark.parametrize(
    ("rare", "count", "frequent"),
    [
        ("2girls", 1, "1girls"),
        ("cat", 1, "car"),
        ("short hair", 1, "long hair"),
        ("long hiar", 4, "long hair"),
        ("sunset", 1, "night sky"),
    ],
)
def test_other_tags_are_no_slips(rare: str, count: int, frequent: str) -> None:
    """Different words, different numbers, and what is not rare."""
    assert misspellings([TagCount(frequent, 20), TagCount(rare, count)]) == []


def test_spellings_of_one_tag_are_found_however_frequent() -> None:
    """Underscores and capitals make two tags of one."""
    slips = misspellings([TagCount("long hair", 20), TagCount("long_hair", 15), TagCount("Long Hair", 1)])
    assert [(slip.tag, slip.meant) for slip in slips] == [("Long Hair", "long hair"), ("long_hair", "long hair")]


def test_many_tags_are_compared_fast() -> None:
    """A slip is found among ten thousand tags that begin and end alike, in a moment."""
    letters = np.random.default_rng(0).choice(list("bcdfglmnprst"), (10_000, 12))
    tags = [TagCount(f"long {''.join(word)} hair", 50 if place % 2 else 1) for place, word in enumerate(letters)]
    begun = time.process_time()
    slips = misspellings([*tags, TagCount("long sliver hair", 1), TagCount("long silver hair", 9)])
    assert "long silver hair" in {slip.meant for slip in slips}
    assert time.process_time() - begun < 20
