"""Weighted captions: brackets that say how much words count, in the grammar of AUTOMATIC1111's web UI.

Imports no torch.
"""

from __future__ import annotations

import re
from itertools import groupby
from operator import itemgetter

ROUND = 1.1
"""What round brackets multiply the weight by where they name no number; square ones divide by it."""

_PIECE = re.compile(
    r"\\(?P<escaped>[\\()\[\]])"
    r"|:\s*(?P<weight>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<text>[^\\()\[\]:]+|:)"  # any other backslash is in no piece
)

Fragment = tuple[str, float]
"""Words and their weight."""


def weighted_fragments(caption: str) -> list[Fragment]:
    """The caption without its brackets, in pieces of one weight each; no two neighbours have the same.

    `(x)` multiplies the weight of x by 1.1, `(x:w)` by w, and `[x]` divides it by 1.1; nested brackets
    multiply. A backslash before a bracket or a backslash makes it a mere character; any other backslash is dropped. A
    bracket that is never closed reaches to the end; one that was never opened is a mere character.
    """
    words: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for place in range(opened[bracket].pop(), len(weights)):
            weights[place] *= factor

    for piece in _PIECE.finditer(caption):
        bracket = piece["bracket"]
        if bracket in opened:
            opened[bracket].append(len(words))
        elif piece["weight"] and opened["("]:
            close("(", float(piece["weight"]))
        elif bracket == ")" and opened["("]:
            close("(", ROUND)
        elif bracket == "]" and opened["["]:
            close("[", 1 / ROUND)
        else:
            words.append(piece["escaped"] or piece[0])
            weights.append(1.0)
    for bracket, factor in (("(", ROUND), ("[", 1 / ROUND)):
        while opened[bracket]:
            close(bracket, factor)
    pieces = groupby(zip(words, weights, strict=True), key=itemgetter(1))
    return [("".join(word for word, _ in own), weight) for weight, own in pieces]
