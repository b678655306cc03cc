"""What the runs of a series came to, side by side: a table, also as CSV and Markdown, and a sheet of previews."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from lorakit.previews.contact_sheet import write_sheet
from lorakit.series.runs import FinishedRun
from lorakit.utils.atomic_io import write_atomically
from lorakit.utils.wording import duration, file_size, shown_path

TITLES = ("run", "steps", "loss", "validation", "lowest", "time", "memory", "result")
"""The columns; `lowest` is the lowest validation loss and its step."""


def rows(runs: Sequence[FinishedRun]) -> list[tuple[str, ...]]:
    """A row for each run, in words."""
    return [_row(found) for found in runs]


def _row(found: FinishedRun) -> tuple[str, ...]:
    report = found.report
    lowest, step = report.get("lowest_validation"), report.get("lowest_validation_step")
    failure = str(report.get("error") or f"exit status {found.status}").splitlines()[0]
    return (
        found.run.label,
        str(report.get("steps", "")),
        _loss(report.get("loss")),
        _loss(report.get("validation")),
        f"{_loss(lowest)} at {step}" if lowest is not None else "",
        duration(report["seconds"]) if "seconds" in report else "",
        file_size(report["memory"]) if "memory" in report else "",
        f"failed: {failure}" if found.status else shown_path(Path(report.get("file") or "")),
    )


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def write_tables(stem: Path, runs: Sequence[FinishedRun]) -> list[Path]:
    """Write the table as `stem.csv` and `stem.md`, whole or not at all; returns the paths. Raises OutputError."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([TITLES, *rows(runs)])
    lines = [" | ".join(cells) for cells in (TITLES, ["---"] * len(TITLES), *(map(_cell, row) for row in rows(runs)))]
    written = {".csv": text.getvalue(), ".md": "".join(f"| {line} |\n" for line in lines)}
    for suffix, content in written.items():
        write_atomically(_beside(stem, suffix), content.encode())
    return [_beside(stem, suffix) for suffix in written]


def write_previews(stem: Path, runs: Sequence[FinishedRun]) -> Path | None:
    """Write the last previews of all runs as `stem.png`, a column for each run; None where none drew any."""
    columns = {found.run.label: [Path(path) for path in found.report.get("previews", [])] for found in runs}
    columns = {label: paths for label, paths in columns.items() if any(path.is_file() for path in paths)}
    if not columns:
        return None
    write_sheet(_beside(stem, ".png"), columns)
    return _beside(stem, ".png")


def _beside(stem: Path, suffix: str) -> Path:
    return stem.with_name(f"{stem.name}{suffix}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
