"""Amounts of memory, as people write and read them; imports no torch."""

from __future__ import annotations

import re

GIB = 2**30
"""Bytes of a GiB."""

_PREFIXES = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """Bytes of an amount such as `8GB`, `8G`, `7.5 GiB` or `512MiB`; in GB if there is no unit.

    Raises ValueError where it is none, or zero.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(i?)(B?)\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"{text!r} is not an amount of memory; write a number and a unit: 8GB, 7.5GiB, 512MiB")
    prefix = found[2].upper() if found[2] or found[4] else "G"
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** _PREFIXES[prefix])
    if not size:
        raise ValueError(f"{text!r} is zero bytes")
    return size


def in_gib(size: int) -> str:
    """An amount in GiB, with as many digits as say something: `3.42`, `0.05`, `0.0012`."""
    gib = size / GIB
    return f"{gib:.2f}" if gib >= 0.1 or not size else f"{gib:.2g}" if gib >= 1e-4 else f"{gib:.0e}"
