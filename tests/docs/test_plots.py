"""The charts of the benchmarks show the numbers of the tables."""

from __future__ import annotations

import importlib.util
import sys

from tests.docs.pages import ROOT


def test_charts_are_current() -> None:
    """Each chart on the page is what `benchmarks/plots.py` makes of the table above it."""
    spec = importlib.util.spec_from_file_location("benchmark_plots", ROOT / "benchmarks" / "plots.py")
    assert spec is not None
    assert spec.loader is not None
    plots = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = plots
    spec.loader.exec_module(plots)
    drawn = dict(plots.pictures(plots.PAGE.read_text(encoding="utf-8")))
    assert len(drawn) > 2
    for name, svg in drawn.items():
        assert (ROOT / "docs" / "images" / name).read_text(encoding="utf-8") == svg, f"{name} is out of date"
