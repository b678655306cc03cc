"""Edits of captions: what they change, and what they leave as it is."""

from __future__ import annotations

import pytest

from lorakit.captioning.edits import CaptionEdits


@pytest.mark.parametrize(
    ("before", "edits", "after"),
    [
        ("cat, sofa", {"prefix": "sks cat, "}, "sks cat, cat, sofa"),
        ("sks cat, sofa", {"prefix": "sks cat, "}, "sks cat, sofa"),
        ("", {"prefix": "photo of a cat, "}, "photo of a cat"),
        ("photo of a cat", {"prefix": "photo of a cat, "}, "photo of a cat"),
        ("astronaut", {"prefix": "a "}, "a astronaut"),
        ("", {"suffix": ", sharp"}, "sharp"),
        ("sharp", {"suffix": ", sharp"}, "sharp"),
        ("unsharp", {"suffix": ", sharp"}, "unsharp, sharp"),
        ("cat", {"suffix": ", best quality"}, "cat, best quality"),
        ("cat, best quality ", {"suffix": ", best quality"}, "cat, best quality"),
        ("Watermark,cat , logo", {"remove_tags": ["watermark", "logo"]}, "cat"),
        ("cat ,dog", {"remove_tags": ["bird"]}, "cat ,dog"),
        ("cat; dog", {"remove_tags": ["dog"], "separator": ";"}, "cat"),
        ("cat, category, black cat", {"replace": [("cat", "dog")]}, "dog, category, black dog"),
        ("a long hiar.", {"replace": [("long hiar", "long hair")]}, "a long hair."),
        ("cat (animal)", {"replace": [("cat (animal)", r"c\1")]}, r"c\1"),
        (":) smile", {"replace": [(":)", "")]}, "smile"),
        ("cat, dog", {"replace": [("cat", "dog"), ("dog", "bird")]}, "bird, bird"),
        ("a, b", {"replace": [("a", "x")], "remove_tags": ["x"], "prefix": "p, ", "suffix": ", s"}, "p, b, s"),
        ("one\ntwo", {"prefix": "a "}, "a one\na two"),
    ],
)
def test_edits(before: str, edits: dict[str, object], after: str) -> None:
    """Each, and in their order; a second time they change nothing, unless they replace words."""
    made = CaptionEdits(**edits)  # type: ignore[arg-type]
    assert made
    assert made.apply(before) == after
    if not made.replace:
        assert made.apply(after) == after


def test_no_edits() -> None:
    """Nothing to do is false."""
    assert not CaptionEdits()
    assert CaptionEdits().apply(" cat ,  dog") == "cat ,  dog"
