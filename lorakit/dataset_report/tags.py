"""Tags: how often each is in the captions, and which ones may be misspelled."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches

from attrs import frozen

from lorakit.config.datasets import SubsetConfig
from lorakit.data.captions import split_parts, split_tags

_RARE = 2
"""Captions that a misspelled tag is in at most."""
_TIMES = 5
"""How many times as often the right spelling is there at least."""
_SIMILAR = 0.75
"""How similar a misspelled word is to the right one, as difflib measures it: twice the characters in common ÷ all."""
_ENDS = 2
"""Characters at the start or at the end of a word that a slip leaves alone; or it leaves the first and the last."""

Key = tuple[tuple[str, ...], tuple[str, ...], str, str]
"""What tags are compared for that have it in common: comparing all with all would take minutes."""


@frozen
class TagCount:
    """A tag, and in how many captions it is."""

    tag: str
    count: int


@frozen
class Misspelling:
    """A tag that may be another one in a wrong spelling."""

    tag: str
    count: int
    """In how many captions it is."""
    meant: str
    """The tag that may be meant."""
    meant_count: int
    """In how many captions that one is."""


def tags_of(caption: str, subset: SubsetConfig) -> set[str]:
    """The tags in the lines of a caption, as written; those joined by `secondary_separator` one by one."""
    found: set[str] = set()
    for line in caption.split("\n"):
        for tag in (tag for part in split_parts(line, subset) for tag in part):
            found |= set(split_tags(tag, subset.secondary_separator)) if subset.secondary_separator else {tag}
    return found


def count_tags(captions: Iterable[set[str]]) -> list[TagCount]:
    """The tags of captions, the most frequent first."""
    counts = Counter(tag for tags in captions for tag in tags)
    return [TagCount(tag, count) for tag, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def misspellings(tags: Iterable[TagCount]) -> list[Misspelling]:
    """Tags that may be misspelled: rare ones of which a word is similar to a frequent one's, and other spellings.

    The latter differ in capitals, underscores, hyphens and spaces alone, and may be as frequent. A number that differs
    is no slip.
    """
    counts = {tag.tag: tag.count for tag in tags}
    found = {slip.tag: slip for slip in _spellings(counts)}
    frequent = {tag: count for tag, count in counts.items() if count >= _TIMES}
    index: dict[Key, dict[str, str]] = defaultdict(dict)
    for tag in frequent:
        for key, word in _keys(tag):
            index[key][word] = tag
    for tag, count in counts.items():
        if count > _RARE or tag in found:
            continue
        pairs = [(key, word) for key, word in _keys(tag) if key in index]
        near = {index[key][own] for key, word in pairs for own in get_close_matches(word, index[key], 1, _SIMILAR)}
        near = {other for other in near if frequent[other] >= _TIMES * count}
        if near:
            meant = max(near, key=lambda other: (frequent[other], other))
            found[tag] = Misspelling(tag, count, meant, frequent[meant])
    return sorted(found.values(), key=lambda slip: (-slip.meant_count, slip.tag))


def _spellings(counts: Mapping[str, int]) -> Iterator[Misspelling]:
    """Tags that are the same but for capitals, underscores, hyphens and spaces, beside the most frequent of them."""
    same: dict[str, list[str]] = defaultdict(list)
    for tag in counts:
        same[re.sub(r"[\s_-]+", "", tag.lower())].append(tag)
    for tags in same.values():
        most, *others = sorted(tags, key=lambda tag: (-counts[tag], tag))
        for other in others:
            yield Misspelling(other, counts[other], most, counts[most])


def _keys(tag: str) -> Iterator[tuple[Key, str]]:
    """What a tag and one with a slip in one of its words have in common, with that word."""
    words, numbers = tag.lower().split(), tuple(re.findall(r"\d+", tag))
    for place, word in enumerate(words):
        others = (*words[:place], "", *words[place + 1 :])
        for same in (("starts", word[:_ENDS]), ("ends", word[-_ENDS:]), ("starts and ends", word[0] + word[-1])):
            yield (others, numbers, *same), word
