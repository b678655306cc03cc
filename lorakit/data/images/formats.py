"""Image formats: which are read, which are only known by name, and whether a file has its end; decodes no image."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

_READ = "png apng jpg jpeg jpe jif jfif jfi pjpeg pjp webp avif tif tiff bmp gif"
EXTENSIONS = frozenset(f".{end}" for end in _READ.split())
"""Extensions, in lower case, of the files that are taken for images."""

# Files are often misnamed, so the content tells the format; Pillow's other readers stay shut to untrusted files.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")
"""The formats that are read, by Pillow's names."""

NAMES = "PNG, JPEG, WebP, AVIF, TIFF, BMP or GIF"
"""The same for messages."""

_RAW = "3fr arw cr2 cr3 crw dng erf iiq k25 kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f"
_VIDEO = "3gp avi flv gifv m4v mkv mov mp4 mpeg mpg ogv ts webm wmv"
_OTHER = (
    "ai avifs cin clip dds djvu emf eps exr fits hdr heic heics heif heifs hif ico icns iff j2c j2k jng jp2 jpf jpm jpx"
    " jxl jxr kra mng ora pam pbm pcx pdf pfm pgm pict pnm ppm ps psb psd qoi sgi svg svgz tga wdp wmf xbm xcf xpm"
)
UNREAD = frozenset(f".{end}" for end in f"{_RAW} {_VIDEO} {_OTHER}".split())
"""Extensions, in lower case, of images and videos that are not read."""

_DISGUISED: Mapping[str, str] = {
    r"....ftyp((heic|heix|heim|heis|hevc|hevx)|(mif1|msf1).*(heic|heix|hevc))": "is a HEIC image",
    r"\xff\x0a|....JXL ": "is a JPEG XL image",
    r"8BPS": "is a Photoshop file",
    r"....ftyp(?!avif|avis|mif1|msf1)|\x1aE\xdf\xa3|RIFF....AVI": "is a video",
    r"\s*<(!doctype html|html)": "is a web page",
    r"version https://git-lfs": "is a Git LFS pointer, not the file itself",
    r"\s*<(\?xml|svg)": "is an SVG or another XML file",
    r"PK\x03\x04": "is a ZIP archive",
}
_STRIPS = ((273, 279), (324, 325))
"""TIFF's tags of where strips or tiles begin and how long they are."""
_MOST_BOXES = 64


def disguised(path: Path) -> str:
    """What a file with an image's name really is, as the end of a sentence; empty if unknown."""
    with path.open("rb") as file:
        head = file.read(64).decode("latin-1")
    found = (said for pattern, said in _DISGUISED.items() if re.match(pattern, head, re.DOTALL | re.IGNORECASE))
    return next(found, "")


def extension_of(name: str) -> str:
    """The extension of a file's name, in lower case and with its dot; empty if it has none."""
    _, dot, extension = name.rpartition(".")
    return f"{dot}{extension.lower()}"


class Ends(NamedTuple):
    """The first and the last bytes of a file."""

    length: int
    """Bytes of the whole file."""
    head: bytes
    """The first 16 bytes."""
    tail: bytes
    """The last 64 bytes."""


def read_ends(path: Path) -> Ends:
    """The first and the last bytes of a file. Raises OSError."""
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        head = file.read(16)
        file.seek(max(length - 64, 0))
        return Ends(length, head, file.read(64))


def has_its_end(path: Path, image: Image.Image, ends: Ends) -> bool:
    """Whether an image file has the end that its format asks for; if not, decoding shows whether it is damaged.

    Finds files that were cut off, which is the common damage.
    """
    if image.format == "TIFF":
        tags: Mapping[int, tuple[int, ...]] = getattr(image, "tag_v2", {})
        pairs = (zip(tags.get(begins, ()), tags.get(counts, ()), strict=False) for begins, counts in _STRIPS)
        strips = [begin + count for found in pairs for begin, count in found]
        return bool(strips) and max(strips) <= ends.length
    if image.format == "AVIF":
        return _has_its_boxes(path, ends.length)
    check = _ENDS.get(image.format or "")
    return check is not None and check(ends)


_ENDS: Mapping[str, Callable[[Ends], bool]] = {
    **dict.fromkeys(("JPEG", "MPO"), lambda ends: ends.tail.rstrip(b"\0\r\n").endswith(b"\xff\xd9")),
    "PNG": lambda ends: ends.tail[-8:-4] == b"IEND",
    "GIF": lambda ends: ends.tail.endswith(b";"),
    "WEBP": lambda ends: int.from_bytes(ends.head[4:8], "little") + 8 <= ends.length,
    "BMP": lambda ends: int.from_bytes(ends.head[2:6], "little") == ends.length,
}
"""Whether a file ends as its format asks for."""


def _has_its_boxes(path: Path, length: int) -> bool:
    at = 0
    with path.open("rb") as file:
        for _ in range(_MOST_BOXES):
            file.seek(at)
            head = file.read(16)
            size = int.from_bytes(head[:4], "big")
            at += int.from_bytes(head[8:16], "big") if size == 1 else size
            if size == 0 or at >= length:  # a box of no size reaches to the end of the file, wherever that is
                return size != 0 and at == length
    return False
