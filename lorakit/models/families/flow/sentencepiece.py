"""Reads vocabularies in files of SentencePiece (`spiece.model`), without its library."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_PIECES, _NORMALIZER = 1, 3
"""Fields of the file: a piece each, and how text is normalized."""
_PIECE, _SCORE = 1, 2
"""Fields of a piece."""
_CHARACTERS = 2
"""The field of the normalizer with the table of characters."""


def read_sentencepiece(content: bytes) -> tuple[list[tuple[str, float]], bytes]:
    """The pieces with their scores, by id, and the table that text is normalized with, which may be empty.

    Raises ValueError for content of another kind.
    """
    pieces: list[tuple[str, float]] = []
    characters = b""
    for number, value in _fields(content):
        if number == _PIECES and isinstance(value, bytes):
            found = dict(_fields(value))
            piece, score = found.get(_PIECE, b""), found.get(_SCORE, 0.0)
            if not isinstance(piece, bytes) or not isinstance(score, float):
                raise ValueError("a piece is not made of a text and a score")
            pieces.append((piece.decode(), score))
        elif number == _NORMALIZER and isinstance(value, bytes):
            table = dict(_fields(value)).get(_CHARACTERS, b"")
            characters = table if isinstance(table, bytes) else b""
    if not pieces:
        raise ValueError("there are no pieces in it")
    return pieces, characters


def _fields(content: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Number and value of each field of a message of Protocol Buffers."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(content, place)
            yield key >> 3, value
        elif kind in (1, 2, 5):
            size, place = (8 if kind == 1 else 4, place) if kind != 2 else _varint(content, place)
            if place + size > len(content):
                raise ValueError("it ends too early")
            raw, place = content[place : place + size], place + size
            yield key >> 3, raw if kind == 2 else struct.unpack("<d" if kind == 1 else "<f", raw)[0]
        else:
            raise ValueError("it is not a file of SentencePiece")


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and the place behind it."""
    value = 0
    for index in range(10):
        if place + index >= len(content):
            raise ValueError("it ends too early")
        byte = content[place + index]
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, place + index + 1
    raise ValueError("it is not a file of SentencePiece")
