"""`lorakit caption`: captions written by a captioner, and edits of captions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.options import catalog

if TYPE_CHECKING:
    from lorakit.api.captioner import Captioner, CaptionerConfig
    from lorakit.captioning.folder import CaptionChange, CaptionOptions, CaptionResult
    from lorakit.errors import DataError


def _pairs(_: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Texts with a `=` as pairs."""
    for text in value:
        if not re.match(r"[^=]+=", text):
            raise click.BadParameter(f"must be {parameter.metavar}, not {text!r}")
    return tuple((left, right) for left, _, right in (text.partition("=") for text in value))


def _extension(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """The extension of caption files, in which nothing else is kept."""
    from lorakit.data.captions import extension_problem

    if value is not None and (problem := extension_problem(value)):
        raise click.BadParameter(problem)
    return value


@click.command(
    epilog="""\b
Examples:
  lorakit caption photos --with tagger --option model=SmilingWolf/wd-vit-tagger-v3
  lorakit caption photos --prefix "sks cat, " --remove-tag watermark --replace hiar=hair --dry-run""",
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--with", "name", metavar="NAME", help="Captioner that writes the captions; `lorakit plugins captioner` lists them."
)
@click.option(
    "--option", "options", multiple=True, metavar="KEY=VALUE", callback=_pairs,
    help="Option of the captioner: --option threshold=0.5; `lorakit plugins NAME` lists them. Repeatable.",
)  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="Device of the captioner: cpu, cuda, cuda:1, mps.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
    help="Images that the captioner is given at once.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Write captions of images that have one, too.")
@click.option(
    "--extension", metavar=".EXT", callback=_extension,
    help="Extension of caption files; by default .txt, or .caption if that is there.",
)  # fmt: skip
@click.option("--prefix", default="", metavar="TEXT", help="Text that each caption is to start with.")
@click.option("--suffix", default="", metavar="TEXT", help="Text that each caption is to end with.")
@click.option("--remove-tag", "remove_tags", multiple=True, metavar="TAG", help="Tag to take out. Repeatable.")
@click.option(
    "--replace", multiple=True, metavar="OLD=NEW", callback=_pairs,
    help="Words or a tag, and what to write instead. Repeatable.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show the captions, and write nothing.")
def caption(folder: Path, **given: Any) -> None:
    """Write captions of the images in FOLDER, or edit those that are there.

    With --with, a captioner writes a caption for each image that has none. Without it, captions that are there are
    edited in place. Edits are made in this order: --replace, --remove-tag, --prefix, --suffix.
    """
    from lorakit.captioning.edits import CaptionEdits
    from lorakit.captioning.folder import CaptionOptions, edit_captions, write_captions

    context = click.get_current_context()
    edits = CaptionEdits(**{key: given[key] for key in ("replace", "remove_tags", "prefix", "suffix")})
    _check_usage(context, given["name"], bool(edits))
    settings = {key: given[key] for key in ("extension", "overwrite", "dry_run", "batch_size")}
    options = CaptionOptions(edits=edits, **settings)
    if given["name"] is None:
        result = edit_captions(folder, options, _show)
    else:
        result = write_captions(folder, _captioner(given["name"], given["options"], given["device"]), options, _show)
    click.echo(_summary(result, options, given["name"]))
    if result.unreadable:
        context.exit(1)


_NEED_CAPTIONER = {
    "options": "--option",
    "device": "--device",
    "batch_size": "--batch-size",
    "overwrite": "--overwrite",
}
"""Options without effect where no captioner is named."""


def _check_usage(context: click.Context, name: str | None, has_edits: bool) -> None:
    """Raise UsageError where there is nothing to do, or an option would have no effect."""
    if name is not None:
        return
    default = click.core.ParameterSource.DEFAULT
    vain = [option for key, option in _NEED_CAPTIONER.items() if context.get_parameter_source(key) is not default]
    if vain:
        raise click.UsageError(f"{vain[0]} is for captioners: choose one, --with NAME", context)
    if not has_edits:
        raise click.UsageError("give --with NAME to write captions, or an edit such as --prefix", context)


def _captioner(name: str, options: Sequence[tuple[str, str]], device: str) -> tuple[CaptionerConfig, Captioner]:
    """The captioner of a name with its options, built. Raises ConfigError for what is wrong with them."""
    from lorakit.api.captioner import CaptionerConfig
    from lorakit.config.load import parse_value
    from lorakit.config.table_reader import TableReader
    from lorakit.errors import ConfigError
    from lorakit.plugins.build import build_component

    found = catalog().find(CaptionerConfig, name)
    reader = TableReader(Path.cwd(), file=f"captioner {name}", catalog=catalog())
    config = reader.structure(found, {key: parse_value(value) for key, value in options}, "")
    if reader.problems or config is None:
        raise ConfigError(reader.problems)
    return config, build_component(config, device)


def _show(event: CaptionChange | DataError) -> None:
    """Print a caption as it is now, below what it was; or what is wrong with a file."""
    from lorakit.captioning.folder import CaptionChange
    from lorakit.utils.wording import printable, shown_path

    if not isinstance(event, CaptionChange):
        click.secho(f"skipped: {event}", fg="red", err=True)
        return
    if event.before is None:
        click.echo(printable(f"{shown_path(event.path)}: {event.after}", keep="\n"))
    else:
        before, after = (text.replace("\n", "\n    ") for text in (event.before, event.after))
        click.echo(printable(f"{shown_path(event.path)}:\n  - {before}\n  + {after}", keep="\n"))


def _summary(result: CaptionResult, options: CaptionOptions, name: str | None) -> str:
    """How many captions were written, left as they are, or passed over."""
    from lorakit.utils.wording import counted

    written = counted(len(result.changes), "caption")
    left = "there already (--overwrite replaces them)"
    if name is None:
        left = "left as it was" if result.kept == 1 else "left as they were"
    parts = [f"{'would write' if options.dry_run else 'wrote'} {written}"]
    parts += [f"{result.kept} {left}"] if result.kept else []
    parts += [f"{counted(result.without, 'image')} without a caption file"] if result.without else []
    parts += [f"{counted(len(result.unreadable), 'file')} skipped"] if result.unreadable else []
    return "; ".join(parts).capitalize()
