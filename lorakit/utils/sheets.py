"""What sheets of pictures are drawn with: text in lines, and pictures scaled to a cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw


def wrap_to_width(draw: ImageDraw, text: str, width: int, most: int) -> str:
    """The text in at most `most` lines of `width` pixels, an ellipsis at its end if there is more; long words break."""
    lines = [""]
    for word in text.split():
        for piece in _pieces(draw, word, width):
            longer = f"{lines[-1]} {piece}".strip()
            if draw.textlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(piece)
        if len(lines) > most:
            break
    return "\n".join(lines[:most]) + (" …" if len(lines) > most else "")


def _pieces(draw: ImageDraw, word: str, width: int) -> list[str]:
    """A word, in parts that are no wider than a line."""
    pieces = [""]
    for character in word:
        if pieces[-1] and draw.textlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def scaled_to_side(picture: Image, side: int) -> Image:
    """The picture with `side` pixels along its longer side, and at least one along the other."""
    from PIL.Image import Resampling

    scale = side / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture.resize(size, Resampling.LANCZOS)
