"""`lorakit data`: what is in a dataset, and what training makes of it."""

from __future__ import annotations

from pathlib import Path

import click

from lorakit.cli.options import ConfigCommand, catalog, print_warnings, with_config


@click.command(
    cls=ConfigCommand,
    epilog="""\b
Example:
  lorakit data config.toml --sheet data.png""",
)
@with_config
@click.option(
    "--sheet", type=click.Path(path_type=Path, dir_okay=False), metavar="PNG",
    help="Draw the images as training sees them, with bucket and caption; further pages are PNG-2, PNG-3, …",
)  # fmt: skip
@click.option(
    "--sheet-images", "most", type=click.IntRange(min=1), default=240, show_default=True, metavar="N",
    help="Images on the sheet at most; the others are counted.",
)  # fmt: skip
def data(config: Path, overrides: tuple[str, ...], sheet: Path | None, most: int) -> None:
    """Report on the images and captions of the config file CONFIG, folder by folder and bucket by bucket.

    What is cropped, enlarged, repeated, cut off or missing, which images are equal or nearly so, which tags there
    are and which may be misspelled. Nothing is changed.
    """
    from lorakit.config.load import read_config
    from lorakit.dataset_report.report import report_data
    from lorakit.dataset_report.sheet import check_sheet_path, write_sheet
    from lorakit.dataset_report.text import report_lines
    from lorakit.utils.wording import listed, printable, shown_path

    loaded = read_config(config, overrides, catalog())
    if sheet is not None:
        check_sheet_path(sheet, loaded)
    report = report_data(loaded)
    print_warnings(report.warnings)
    for line in report_lines(report):
        click.echo(printable(line))
    if sheet is not None:
        pages = write_sheet(sheet, report, loaded.training.seed, most)
        left = len(report.images) - most
        rest = f", with the first {most} of {len(report.images)} images" if left > 0 else ""
        click.echo(f"\nWrote {listed([shown_path(page) for page in pages])}{rest}")
