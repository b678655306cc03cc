"""Damaged bytes, JSON values and texts, made from sound ones; and how many of them a run tries.

`LORAKIT_FUZZ=5000` tries 5000 of each kind instead of the few of an ordinary test run; `LORAKIT_FUZZ_COUNTS` is a file
to which the tries are counted.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TRIES = int(os.environ.get("LORAKIT_FUZZ", "0"))
COUNTS = os.environ.get("LORAKIT_FUZZ_COUNTS")


def few(tries: int) -> settings:
    """Settings of a test that ordinarily tries so many inputs."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=TRIES or tries, deadline=None, suppress_health_check=checks, derandomize=not TRIES)


def count(kind: str, outcome: str) -> None:
    """Count an input of a kind, and what came of it, where counts are kept."""
    if COUNTS:
        with Path(COUNTS).open("a", encoding="utf-8") as file:
            file.write(f"{kind}\t{outcome}\n")


ODD = [
    0,
    1,
    -1,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    2**31,
    2**63,
    10**30,
    True,
    False,
    None,
    "",
    "\0",
    "~x",
    "é" * 300,
]

scalars = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8) | st.booleans()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, sound: bytes, most: int = 6) -> bytes:
    """Bytes with some changed, put in, taken out, doubled or cut off."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 9))
        edit = draw(st.sampled_from(("flip", "put", "take", "double", "cut", "fill")))
        if edit == "flip" and at < len(content):
            content[at] = draw(st.integers(0, 255))
        elif edit == "put":
            content[at:at] = draw(st.binary(max_size=9))
        elif edit == "take":
            del content[at : at + length]
        elif edit == "double":
            content[at:at] = content[at : at + 10 * length]
        elif edit == "cut":
            del content[at:]
        elif edit == "fill":
            content[at : at + length] = draw(st.sampled_from((b"\0", b"\xff", b"\x7f", b"9"))) * length
    return bytes(content)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value, with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


@st.composite
def mutated(draw: st.DrawFn, sound: Any, others: st.SearchStrategy[Any] = values) -> Any:
    """A value of JSON or TOML with some entries replaced, renamed, doubled or removed."""
    value = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(0, 4))):
        places = _places(value)
        if not places:
            return copy.deepcopy(draw(others))
        container, key = draw(st.sampled_from(places))
        edit = draw(st.sampled_from(("replace", "replace", "remove", "rename", "move")))
        if edit == "replace":
            # A copy, because later edits must not reach the next example.
            container[key] = copy.deepcopy(draw(others))
        elif edit == "remove" or isinstance(container, list):
            del container[key]
        elif edit == "rename":
            container[draw(st.text(max_size=6))] = container.pop(key)
        else:
            container[key] = json.loads(json.dumps(draw(st.sampled_from(places))[0]))
    return value


def ends_well(kind: str, act: Callable[[], object], errors: type[Exception], *named: str) -> None:
    """Assert that an act works, or ends as an error that names one of these and has a reason."""
    try:
        act()
    except errors as error:
        text = str(error)
        assert any(name in text for name in named), text
        assert len(text) < 100_000
        count(kind, "refused")
    else:
        count(kind, "taken")
