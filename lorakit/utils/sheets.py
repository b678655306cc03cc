"""What sheets of pictures are drawn with: text in lines, and pictures scaled to a cell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    AnyFont = FreeTypeFont | ImageFont
    """A font as Pillow has it."""

_SYSTEM_FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "NotoSansCJK-Regular.ttc",
    "segoeui.ttf", "YuGothM.ttc", "msgothic.ttc", "msyh.ttc", "malgun.ttf",
    "Arial Unicode.ttf", "Hiragino Sans GB.ttc",
)  # fmt: skip
"""Fonts that Linux, Windows or macOS may have, of which Pillow knows the folders."""


def font_for(text: str, size: int) -> AnyFont:
    """Pillow's own font, which has ASCII alone; for other text, the system's font that has most of its characters."""
    from PIL import ImageFont

    own = ImageFont.load_default(size)
    wanted = {character for character in text if not character.isspace()}
    return own if text.isascii() else min([own, *_system_fonts(size)], key=lambda font: len(_missing(font, wanted)))


def _system_fonts(size: int) -> Iterator[FreeTypeFont]:
    from PIL import ImageFont

    for name in _SYSTEM_FONTS:
        try:
            yield ImageFont.truetype(name, size)
        except OSError:  # it is not there
            continue


def _missing(font: AnyFont, characters: set[str]) -> set[str]:
    """Those of the characters that are drawn as the box that stands for what a font lacks."""
    box = bytes(font.getmask("\uffff"))
    return {character for character in characters if bytes(font.getmask(character)) == box}


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
