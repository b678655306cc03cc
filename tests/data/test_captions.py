"""Captions: what is read from which file, and what each option makes of it in each epoch."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.config.datasets import SubsetConfig
from lorakit.data.captions import (
    CaptionContext,
    apply_caption_options,
    by_lower_extension,
    caption_variants,
    fill_wildcards,
    find_caption,
    has_choice,
    read_caption,
    tags_after,
)
from lorakit.errors import DataError
from lorakit.utils.rng import keyed_generator

WriteFiles = Callable[[Mapping[str, bytes]], Path]


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"a cat", "a cat"),
        (b"\xef\xbb\xbfa cat\r\nsecond line", "a cat\nsecond line"),
        ("un château d’été".encode(), "un château d’été"),
        (b"  a cat , sitting \n", "a cat , sitting"),
        (b"first\rsecond", "first\nsecond"),
        (b"\n\n a cat\n", "a cat"),
        (b"\xef\xbb\xbf a cat\r\n\r\n sitting \rthere\n", "a cat\nsitting\nthere"),
        (b"", ""),
        (b" \n\n", ""),
    ],
)
def test_lines_of_a_caption(write_files: WriteFiles, content: bytes, caption: str):
    """The lines that are not blank, whatever the line ends, without a byte-order mark; none is an empty caption."""
    assert read_caption(write_files({"a.txt": content}) / "a.txt") == caption


@pytest.mark.parametrize("content", ["é".encode("latin-1"), "a cat".encode("utf-16")])
def test_caption_that_is_not_utf8(write_files: WriteFiles, content: bytes):
    """Another encoding is an error that names the file and the cure."""
    with pytest.raises(DataError, match=r"a\.txt: is not UTF-8 text .*\(save it as UTF-8\)"):
        read_caption(write_files({"a.txt": content}) / "a.txt")


def test_caption_that_cannot_be_read(tmp_path: Path):
    """A folder in the place of a caption file is an error that names it."""
    with pytest.raises(DataError, match=f"{tmp_path}: cannot be read"):
        read_caption(tmp_path)


def test_which_file_is_the_caption(write_files: WriteFiles):
    """Without an extension .txt comes before .caption; a given extension is the only one, with or without its dot.

    Its case does not count, but where files differ in it, the one that is written as asked for is taken.
    """
    files = {"a.txt": b"1", "a.caption": b"2", "a.tags": b"3", "b.caption": b"4", "a_wd.txt": b"5", "a.TXT": b"6"}
    folder = write_files({**files, "d.TXT": b"7", "e.Txt": b"8", "a.TAGS": b"9"})

    def found(name: str, extension: str | None) -> str | None:
        subset = SubsetConfig(image_dir=folder, caption_extension=extension)
        path = find_caption(folder / name, subset, by_lower_extension([path.name for path in folder.iterdir()]))
        assert path is None or path.is_file()
        return path and path.name

    assert found("a.png", None) == "a.txt"
    assert found("b.png", None) == "b.caption"
    assert found("c.png", None) is None
    assert found("b.png", ".txt") is None
    assert (found("d.png", None), found("e.png", None), found("d.png", ".txt")) == ("d.TXT", "e.Txt", "d.TXT")
    assert found("a.png", ".tags") == found("a.png", "tags") == "a.tags"
    assert found("a.png", "_wd.txt") == "a_wd.txt"


def used(caption: str, epoch: int = 1, step: int = 0, **settings: object) -> str:
    """The caption as an epoch and step of a run of 1000 steps use it."""
    subset = SubsetConfig(image_dir=Path(), **settings)
    return apply_caption_options(
        caption, subset, CaptionContext(epoch, step, 1000), lambda what: keyed_generator(0, what, epoch)
    )


shuffled = partial(used, shuffle_caption=True)


def test_caption_stays_as_it_is_written_unless_asked():
    """Without options, and with nothing to shuffle, not a character changes."""
    assert used("b ,a,, {c|d} ||| e;;;f") == "b ,a,, {c|d} ||| e;;;f"
    assert shuffled("a cat  sitting") == "a cat  sitting"
    assert shuffled("a,b", keep_tokens=1) == "a,b"


def test_shuffling_moves_every_tag_but_the_kept_ones():
    """Over many epochs, each loose tag comes to each loose place, and the kept ones never move."""
    captions = [shuffled("sks, cat, red , blue,green", epoch, keep_tokens=2).split(", ") for epoch in range(60)]
    assert {tuple(tags[:2]) for tags in captions} == {("sks", "cat")}
    assert all({tags[place] for tags in captions} == {"red", "blue", "green"} for place in (2, 3, 4))


def test_shuffling_leaves_out_empty_tags():
    """A comma at the end does not become a tag of its own that wanders into the caption."""
    assert all(sorted(shuffled("b, ,a,", epoch).split(", ")) == ["a", "b"] for epoch in range(10))


@pytest.mark.parametrize(("separator", "joint"), [(",", ", "), (";", "; "), (", ", ", "), (" ", " ")])
def test_tags_are_joined_by_their_separator(separator: str, joint: str):
    """Another separator stays itself, followed by one space."""
    caption = shuffled(separator.join("abc"), caption_separator=separator)
    assert sorted(caption.split(joint)) == ["a", "b", "c"]
    assert len(caption) == 3 + 2 * len(joint)


@pytest.mark.parametrize(
    ("caption", "settings", "expected"),
    [
        ("cat, red", {"caption_prefix": "sks,", "caption_suffix": ", photo"}, "sks, cat, red , photo"),
        ("", {"caption_prefix": "sks"}, "sks"),
        ("", {"caption_suffix": "photo"}, "photo"),
        ("a, b;;;c, d", {"secondary_separator": ";;;"}, "a, b,c, d"),
        ("a; b--c", {"secondary_separator": "--", "caption_separator": ";"}, "a; b;c"),
        ("a, b ||| c,, d", {"keep_tokens_separator": "|||"}, "a, b, c, d"),
        ("a ||| b ||| c ||| d", {"keep_tokens_separator": "|||"}, "a, b, c, d"),
        ("||| a |||", {"keep_tokens_separator": "|||"}, "a"),
        ("{{a}} {b}", {"enable_wildcard": True}, "{a} b"),
        ("a\nb", {"caption_dropout_rate": 1}, ""),
        ("a, b, c", {"caption_tag_dropout_rate": 1, "keep_tokens": 1}, "a"),
        ("a, b ||| c, d ||| e", {"caption_tag_dropout_rate": 1, "keep_tokens_separator": "|||"}, "a, b, e"),
    ],
)
def test_what_options_make_of_a_caption(caption: str, settings: dict[str, object], expected: str):
    """Prefix, suffix, separators, wildcards and certain dropout give the text that is written out here."""
    assert used(caption, **settings) == expected


def test_kept_parts_of_a_caption_stay_where_they_are():
    """With a keep separator the tags before it stay first and those after a second one last, in every epoch."""
    text = "sks, cat ||| red, blue, green ||| photo, sharp"
    captions = [shuffled(text, epoch, keep_tokens_separator="|||", keep_tokens=4).split(", ") for epoch in range(60)]
    assert {(tags[0], tags[1], tags[5], tags[6]) for tags in captions} == {("sks", "cat", "photo", "sharp")}
    assert len({tuple(tags[2:5]) for tags in captions}) == 6
    without = [shuffled("a, b, c", epoch, keep_tokens_separator="|||", keep_tokens=1) for epoch in range(20)]
    assert set(without) == {"a, b, c", "a, c, b"}


def test_tags_of_a_second_separator_stay_together():
    """Tags joined by the second separator are shuffled as one and come out as tags."""
    captions = {shuffled("red;;;blue, green, sky", epoch, secondary_separator=";;;") for epoch in range(60)}
    assert len(captions) == 6
    assert all("red,blue" in caption for caption in captions)


def test_prefix_and_suffix_are_part_of_every_line():
    """Whichever line is picked has both, and wildcards in them are filled in."""
    settings = {"enable_wildcard": True, "caption_prefix": "{sks|zwx}", "caption_suffix": ", photo"}
    assert {used("a\nb", epoch, **settings) for epoch in range(60)} == {
        f"{prefix} {line} , photo" for prefix in ("sks", "zwx") for line in "ab"
    }


def test_lines_and_wildcards_are_picked_evenly():
    """Each line and each part of a wildcard comes as often as any other, independently."""
    counts = Counter(used("{a|b|c} x\ny", epoch, enable_wildcard=True) for epoch in range(6000))
    assert counts.keys() == {"a x", "b x", "c x", "y"}
    assert abs(counts.pop("y") - 3000) < 5 * math.sqrt(6000 / 4)
    assert all(abs(count - 1000) < 5 * math.sqrt(6000 * 5 / 36) for count in counts.values())


@given(st.text("{}|ab ", max_size=14), st.integers(0, 1000))
def test_wildcards_are_those_of_sd_scripts(text: str, seed: int):
    """Braces in any order give what replacing doubled ones, then wildcards, then the doubled ones back gives."""
    generator = np.random.default_rng(seed)

    def pick(match: re.Match[str]) -> str:
        options = match[1].split("|")
        return options[generator.integers(len(options))]

    filled = re.sub(r"\{([^}]+)\}", pick, text.replace("{{", "<").replace("}}", ">"))
    assert fill_wildcards(text, np.random.default_rng(seed)) == filled.replace("<", "{").replace(">", "}")
    outcomes = {fill_wildcards(text, np.random.default_rng(seed)) for seed in range(40)}
    assert len(outcomes) == 1 or has_choice(text)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_captions_and_tags_are_dropped_at_their_rate(rate: float):
    """Over many draws the share of empty captions, and of left-out tags, is the rate within five deviations."""
    epochs = 4000
    deviation = math.sqrt(rate * (1 - rate) / epochs)
    empty = sum(used("a, b", epoch, caption_dropout_rate=rate) == "" for epoch in range(1, epochs + 1))
    assert abs(empty / epochs - rate) < 5 * deviation
    captions = [used("k, a, b, c", epoch, caption_tag_dropout_rate=rate, keep_tokens=1) for epoch in range(epochs)]
    assert all(caption.startswith("k") for caption in captions)
    for tag in "abc":
        assert abs(sum(tag not in caption for caption in captions) / epochs - rate) < 5 * deviation
    together = sum("a" not in caption and "b" not in caption for caption in captions) / epochs
    assert abs(together - rate**2) < 5 * math.sqrt(rate**2 * (1 - rate**2) / epochs)


def test_captions_are_dropped_every_so_many_epochs():
    """In epochs 3, 6, 9 the caption is empty, in all others it is not."""
    dropped = [epoch for epoch in range(1, 10) if used("a", epoch, caption_dropout_every_n_epochs=3) == ""]
    assert dropped == [3, 6, 9]


def test_draws_do_not_depend_on_each_other():
    """Switching one option on does not change what another draws."""
    text = ", ".join("abcdefgh")
    for epoch in range(1, 30):
        both = used(text, epoch, shuffle_caption=True, caption_dropout_rate=0.5)
        assert both in ("", shuffled(text, epoch))
        assert (both == "") == (used(text, epoch, caption_dropout_rate=0.5) == "")


@pytest.mark.parametrize(
    ("tags", "least", "warmup", "expected"),
    [
        # ⌊step · (tags − least) / warm-up⌋ + least at steps 0, 1, 5, 9, 10, 11.
        (11, 1, 10, [1, 2, 6, 10, 11, 11]),
        (6, 2, 10, [2, 2, 4, 5, 6, 6]),
        (3, 0, 10, [0, 0, 1, 2, 3, 3]),
        (2, 5, 10, [2, 2, 2, 2, 2, 2]),
        (11, 1, 0, [11] * 6),
        (11, 1, 0.01, [1, 2, 6, 10, 11, 11]),
        (11, 1, 0.0001, [11] * 6),
    ],
)
def test_how_many_tags_a_warmup_lets_through(tags: int, least: int, warmup: float, expected: list[int]):
    """The formula's values, with a warm-up in steps and as a share of a run of 1000 steps."""
    subset = SubsetConfig(image_dir=Path(), token_warmup_step=warmup, token_warmup_min=least)
    assert [tags_after(step, tags, subset, 1000) for step in (0, 1, 5, 9, 10, 11)] == expected


def test_warmup_uses_the_first_loose_tags():
    """Kept tags are always there; of the loose ones the first as written, which are then shuffled."""
    settings = {"token_warmup_step": 4, "keep_tokens_separator": "|||"}
    captions = [used("k ||| a, b, c ||| z", 1, step, **settings) for step in range(5)]
    assert captions == ["k, a, z", "k, a, z", "k, a, b, z", "k, a, b, z", "k, a, b, c, z"]
    mixed = {shuffled("a, b, c", epoch, 2, token_warmup_step=4) for epoch in range(30)}
    assert mixed == {"a, b", "b, a"}


@pytest.mark.parametrize(
    ("caption", "settings", "possible"),
    [
        ("a, b", {}, ["a, b"]),
        ("a, b", {"caption_prefix": "x", "caption_suffix": "y"}, ["x a, b y"]),
        ("a, b", {"caption_dropout_rate": 0.1}, ["a, b", ""]),
        ("", {"caption_dropout_every_n_epochs": 2}, [""]),
        ("a\nb\nb", {"enable_wildcard": True}, ["a", "b"]),
        ("{a|b}", {}, ["{a|b}"]),
        ("{a|b}", {"enable_wildcard": True}, None),
        ("{{a}} {c}", {"enable_wildcard": True}, ["{a} c"]),
        ("a", {"enable_wildcard": True, "caption_suffix": "{a|b}"}, None),
        ("a, b", {"shuffle_caption": True}, None),
        ("a, b", {"shuffle_caption": True, "keep_tokens": 1}, ["a, b"]),
        ("a ||| b ||| c", {"shuffle_caption": True, "keep_tokens_separator": "|||"}, ["a, b, c"]),
        ("a ||| b, c", {"shuffle_caption": True, "keep_tokens_separator": "|||"}, None),
        ("a, b", {"caption_tag_dropout_rate": 0.5, "keep_tokens": 2}, ["a, b"]),
        ("a", {"caption_tag_dropout_rate": 0.5}, None),
        ("a, b", {"token_warmup_step": 10}, None),
        ("a, b", {"token_warmup_step": 10, "token_warmup_min": 2}, ["a, b"]),
        ("a;;;b", {"secondary_separator": ";;;"}, ["a,b"]),
    ],
)
def test_all_that_captions_may_become(caption: str, settings: dict[str, object], possible: list[str] | None):
    """Captions that vary freely have no list; the list of the others is exactly what is used over many epochs."""
    found = caption_variants(caption, SubsetConfig(image_dir=Path(), **settings))
    assert found == (None if possible is None else tuple(possible))
    seen = {used(caption, epoch, epoch, **settings) for epoch in range(200)}
    assert len(seen) > 1 if possible is None else seen == set(possible)
