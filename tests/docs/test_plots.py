"""The pictures of the benchmarks: they show what the tables say."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from xml.etree import ElementTree

import pytest

from tests.docs.pages import ROOT

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    """The script that draws them."""
    spec = importlib.util.spec_from_file_location("benchmark_plots", ROOT / "benchmarks" / "plots.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_pictures_are_of_the_tables_as_they_are(plots: ModuleType) -> None:
    """Each picture on the page is what the table above it makes; otherwise run benchmarks/plots.py."""
    drawn = dict(plots.pictures(plots.PAGE.read_text(encoding="utf-8")))
    assert len(drawn) > 2
    for name, svg in drawn.items():
        assert (ROOT / "docs" / "images" / name).read_text(encoding="utf-8") == svg, f"{name} is out of date"


TABLE = """
| variant | step (s) | ÷ floor | note |
|---|---|---|---|
| floor | 2.00 | 1.00 | a |
| `mine & yours` | 3.00 | 1.50 | b |

![A <title>](images/some-name.svg)
"""


def test_bars_are_as_long_as_the_numbers(plots: ModuleType) -> None:
    """Bars have the ratios of the numbers, which are written beside them, with the rows' names and the title."""
    ((name, svg),) = plots.pictures(TABLE)
    root = ElementTree.fromstring(svg)  # noqa: S314 - our own
    bars = [float(bar.attrib["width"]) for bar in root.iter(f"{SVG}rect") if bar.attrib["class"] == "bar"]
    (line,) = root.iter(f"{SVG}line")
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert name == "some-name.svg"
    assert texts == ["A <title>", "step (s) ÷ floor", "floor", "1.00", "mine & yours", "1.50"]
    assert bars[1] == pytest.approx(1.5 * bars[0], abs=0.1)
    assert float(line.attrib["x1"]) - plots.LABELS == pytest.approx(bars[0], abs=0.1)


def test_a_picture_of_nothing_is_refused(plots: ModuleType) -> None:
    """A picture without a table of ratios above it is an error that names it."""
    with pytest.raises(ValueError, match=r"^some-name\.svg: there is no table"):
        list(plots.pictures(TABLE.replace("÷", "over")))
