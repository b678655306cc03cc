"""Captions: what is read from which file, and how tags are shuffled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from lorakit.config.datasets import SubsetConfig
from lorakit.data.captions import caption_for_epoch, find_caption, read_caption
from lorakit.errors import DataError
from lorakit.randomness import keyed_generator

WriteFiles = Callable[[Mapping[str, bytes]], Path]


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"a cat", "a cat"),
        (b"\xef\xbb\xbfa cat\r\nsecond line", "a cat"),
        ("un château d’été".encode(), "un château d’été"),
        (b"  a cat , sitting \n", "a cat , sitting"),
        (b"first\rsecond", "first"),
        (b"\n\n a cat\n", "a cat"),
        (b"", ""),
        (b" \n\n", ""),
    ],
)
def test_caption_is_the_first_line(write_files: WriteFiles, content: bytes, caption: str):
    """The first line that is not blank, whatever the line ends, without a byte-order mark; none is an empty caption."""
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
    """Without an extension .txt comes before .caption; a given extension is the only one, with or without its dot."""
    folder = write_files({"a.txt": b"1", "a.caption": b"2", "a.tags": b"3", "b.caption": b"4", "a_wd.txt": b"5"})

    def found(name: str, extension: str | None) -> str | None:
        subset = SubsetConfig(image_dir=folder, caption_extension=extension)
        path = find_caption(folder / name, subset, {path.name for path in folder.iterdir()})
        assert path is None or path.is_file()
        return path and path.name

    assert found("a.png", None) == "a.txt"
    assert found("b.png", None) == "b.caption"
    assert found("c.png", None) is None
    assert found("b.png", ".txt") is None
    assert found("a.png", ".tags") == found("a.png", "tags") == "a.tags"
    assert found("a.png", "_wd.txt") == "a_wd.txt"


def shuffled(caption: str, epoch: int = 1, **settings: object) -> str:
    """The caption as an epoch uses it."""
    subset = SubsetConfig(image_dir=Path(), shuffle_caption=True, **settings)
    return caption_for_epoch(caption, subset, keyed_generator(0, "caption", epoch))


def test_caption_stays_as_it_is_written_unless_shuffled():
    """Without shuffle_caption, and with nothing to shuffle, not a character changes."""
    subset = SubsetConfig(image_dir=Path())
    assert caption_for_epoch("b ,a,, c", subset, keyed_generator(0)) == "b ,a,, c"
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
