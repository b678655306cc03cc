"""A grid as one sheet, and as an HTML page that one can page through."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from string import Template
from urllib.parse import quote

from lorakit.grid.draw import Column
from lorakit.previews.contact_sheet import write_sheet
from lorakit.previews.prompts import PreviewJob
from lorakit.utils.atomic_io import write_atomically

_PAGE = Template("""<!doctype html>
<meta charset="utf-8">
<title>$title</title>
<style>
body { font: 14px sans-serif; margin: 1em }
table { border-collapse: collapse }
th, td { padding: 4px; vertical-align: top; text-align: left }
thead th { position: sticky; top: 0; background: white; white-space: pre }
tbody th { max-width: 16em; font-weight: normal }
td img { width: 12em; cursor: zoom-in; display: block }
#large { position: fixed; inset: 0; background: #000d; color: white; display: none; text-align: center }
#large img { max-width: 96vw; max-height: 90vh }
</style>
<h1>$title</h1>
<p>Click a picture to enlarge it; the arrow keys go to the next one, Escape closes it.</p>
<table>
<thead><tr><th></th>$heads</tr></thead>
<tbody>
$rows
</tbody>
</table>
<div id="large"><img alt=""><p></p></div>
<script>
const rows = [...document.querySelectorAll("tbody tr")].map(row => [...row.querySelectorAll("img")]);
const large = document.getElementById("large");
let place = null;
function show(row, column) {
  if (!rows[row] || !rows[row][column]) return;
  place = [row, column];
  large.querySelector("img").src = rows[row][column].src;
  large.querySelector("p").textContent = rows[row][column].alt;
  large.style.display = "block";
}
rows.forEach((row, r) => row.forEach((image, c) => image.onclick = () => show(r, c)));
large.onclick = () => { large.style.display = "none"; place = null };
document.onkeydown = event => {
  const moves = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
  if (place && moves[event.key]) {
    event.preventDefault();
    show(place[0] + moves[event.key][0], place[1] + moves[event.key][1]);
  } else if (event.key === "Escape") large.onclick();
};
</script>
""")


def write_grid(folder: Path, title: str, jobs: Sequence[PreviewJob], columns: Sequence[Column]) -> tuple[Path, Path]:
    """Write `grid.png` and `grid.html` into the folder of the pictures; returns both. Raises OutputError."""
    sheet, page = folder / "grid.png", folder / "grid.html"
    write_sheet(sheet, {column.title: column.pictures for column in columns}, whole=True)
    write_atomically(page, _page(title, jobs, columns).encode())
    return sheet, page


def _page(title: str, jobs: Sequence[PreviewJob], columns: Sequence[Column]) -> str:
    heads = "".join(f"<th>{html.escape(column.title)}</th>" for column in columns)
    rows = []
    for index, job in enumerate(jobs):
        cells = "".join(_cell(column, index) for column in columns)
        rows.append(f"<tr><th>{html.escape(job.prompt.prompt)}<br>seed {job.seed}</th>{cells}</tr>")
    return _PAGE.substitute(title=html.escape(title), heads=heads, rows="\n".join(rows))


def _cell(column: Column, index: int) -> str:
    name, words = column.pictures[index].name, column.title.replace("\n", ", ")
    return f'<td><img loading="lazy" src="{quote(name)}" alt="{html.escape(words)}"></td>'
