"""Draws the tables of docs/benchmarks.md.

    python benchmarks/plots.py

Each picture that the page shows, `![title](images/NAME.svg)`, is of the table above it: its columns of ratios, whose
headings begin with ÷, as bars. So what is drawn is what the page says; after a table was changed, run this again.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "benchmarks.md"

LABELS, BARS, NUMBERS, ROW, HEADING, TITLE = 140, 260, 44, 22, 28, 30
"""Pixels: width of names, of the longest bar, of a number behind it; height of a row, of a heading, of the title."""
COLOURS = ("#4878a8", "#8a8a8a")
"""Of lorakit's own rows, and of what they are compared with."""
OTHERS = ("floor", "peft", "headers", "loop")
"""First words of rows that are no measurement of lorakit."""


@dataclass(frozen=True)
class Chart:
    """Bars for the rows of a column."""

    heading: str
    """What the ratio is of: `step (s) ÷ floor`."""
    names: Sequence[str]
    """The rows."""
    ratios: Sequence[float]
    """The number in each row."""


def main() -> None:
    """Write all pictures of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for name, svg in pictures(PAGE.read_text(encoding="utf-8")):
        (DOCS / "images" / name).write_text(svg, encoding="utf-8")
        print(name)


def pictures(page: str) -> Iterator[tuple[str, str]]:
    """File name and content of each picture on a page of Markdown. Raises ValueError where there is nothing to draw."""
    table: list[str] = []
    lines = page.splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            table = [*table, line] if before.startswith("|") else [line]
        found = re.fullmatch(r"!\[(.+)\]\(images/([\w-]+\.svg)\)", line)
        if found:
            drawn = charts(table)
            if not drawn:
                raise ValueError(f"{found[2]}: there is no table with a column of ratios (÷) above it")
            yield found[2], draw(found[1], drawn)


def charts(table: Sequence[str]) -> list[Chart]:
    """The columns of ratios in a table, given as its lines of Markdown."""
    if not table:
        return []
    headings, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    names = [row[0].strip("`") for row in rows]
    return [
        Chart(f"{headings[column - 1]} {heading}", names, [float(row[column]) for row in rows])
        for column, heading in enumerate(headings)
        if heading.startswith("÷")
    ]


def draw(title: str, drawn: Sequence[Chart]) -> str:
    """An SVG of charts, one below the other, each with a line where the ratio is 1."""
    width = LABELS + BARS + NUMBERS
    parts, top = [_text(8, 20, title, "bold")], TITLE
    for chart in drawn:
        parts += _chart(chart, top)
        top += HEADING + ROW * len(chart.names)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + 8}" '
        f'font-family="sans-serif" font-size="12" fill="#222">\n'
        f'<rect class="paper" width="{width}" height="{top + 8}" fill="white"/>\n{body}\n</svg>\n'
    )


def _chart(chart: Chart, top: int) -> Iterator[str]:
    scale = BARS / max(*chart.ratios, 1.0)
    yield _text(8, top + 18, chart.heading)
    first = top + HEADING
    for number, (name, ratio) in enumerate(zip(chart.names, chart.ratios, strict=True)):
        y, length = first + number * ROW, ratio * scale
        colour = COLOURS[name.split()[0] in OTHERS]
        yield _text(LABELS - 8, y + 14, name, anchor="end")
        yield f'<rect class="bar" x="{LABELS}" y="{y}" width="{length:.1f}" height="{ROW - 6}" fill="{colour}"/>'
        yield _text(round(LABELS + length + 5), y + 13, f"{ratio:.2f}")
    one, bottom = f"{LABELS + scale:.1f}", first + ROW * len(chart.names) - 3
    yield f'<line x1="{one}" y1="{first - 3}" x2="{one}" y2="{bottom}" stroke="#222" stroke-dasharray="3 2"/>'


def _text(x: int, y: int, text: str, weight: str = "normal", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" font-weight="{weight}" text-anchor="{anchor}">{escape(text)}</text>'


if __name__ == "__main__":
    main()
