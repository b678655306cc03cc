"""The figures of the benchmarks show what the tables say."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.benchmarks.scripts import load
from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    """The script that draws them."""
    return load("plots")


def test_pictures_are_of_the_tables_as_they_are(plots: ModuleType) -> None:
    """Each picture on the page is what the table above it makes; otherwise run benchmarks/plots.py."""
    drawn = dict(plots.pictures(plots.PAGE.read_text(encoding="utf-8")))
    assert len(drawn) > 2
    for name, svg in drawn.items():
        assert (ROOT / "docs" / "images" / name).read_text(encoding="utf-8") == svg, f"{name} is out of date"
