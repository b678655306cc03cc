"""`lorakit grid`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.options import catalog
from lorakit.errors import ConfigError, OutputError, Problem

if TYPE_CHECKING:
    from lorakit.config.train_config import TrainConfig
    from lorakit.previews.prompts import PreviewJob


def _numbers(_: click.Context, __: click.Parameter, value: str) -> list[float]:
    try:
        found = [*dict.fromkeys(float(text) for text in value.split(","))]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        raise click.BadParameter(f"must be numbers such as 0.6,0.8,1, not {value!r}")
    return found


@click.command(
    epilog="""\b
Example:
  lorakit grid config.toml --strengths 0.6,0.8,1
  lorakit grid --model v1-5.safetensors --lora cat.safetensors --prompt "a cat" -o grid""",
)
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option("--model", metavar="MODEL", help="Base model instead of a config: a file, a folder, or a Hub id.")
@click.option(
    "--lora", "files", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
    help="LoRA file to draw with; all saves of the config if absent. Repeatable.",
)  # fmt: skip
@click.option(
    "--strengths", default="1", show_default=True, metavar="S1,S2", callback=_numbers, help="Strengths of each LoRA.",
)  # fmt: skip
@click.option(
    "--prompt", "lines", multiple=True, metavar="TEXT",
    help="Prompt, with options such as --d 1 --w 512 as in prompt files. Repeatable.",
)  # fmt: skip
@click.option(
    "--prompts", "prompt_file", type=click.Path(path_type=Path), metavar="FILE",
    help="Prompt file; the prompts of the config's observer `samples` if absent.",
)  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a config key. Repeatable.")
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Images to sample at once.")
@click.option(
    "-o", "output", type=click.Path(path_type=Path), metavar="FOLDER",
    help="Folder for the pictures; NAME-grid in the config's output folder if absent.",
)  # fmt: skip
def grid(config: Path | None, model: str | None, files: tuple[Path, ...], **options: Any) -> None:
    """Draw prompts with several LoRA files at several strengths on one sheet.

    With CONFIG, those are all saves of its run, with the prompts of its previews; nothing is trained. Each picture is a
    PNG file with its parameters; grid.png shows all of them, and grid.html lets you page through them.
    """
    if (config is None) == (model is None):
        raise click.UsageError("give a config, or --model with --lora and --prompt")
    base = _config(config, model, options["overrides"])
    name = base.output.name if config else "LoRA"
    folder = options["output"] or (base.output.dir / f"{name}-grid" if config else Path("grid"))
    from lorakit.grid.draw import GridPlan, saves_of
    from lorakit.grid.page import write_grid
    from lorakit.utils.atomic_io import unwritable_reason
    from lorakit.utils.wording import counted, shown_path

    chosen = list(dict.fromkeys(files)) or (saves_of(base) if config else [])
    if not chosen:
        raise click.UsageError(f"{config} has no saves yet; train, or give --lora" if config else "give --lora")
    if missing := [str(file) for file in chosen if not file.is_file()]:
        raise click.UsageError(f"--lora: there is no file {missing[0]}")
    if reason := unwritable_reason(folder):
        raise OutputError(f"{folder}: {reason}; choose another folder with -o")
    jobs = _jobs(base, options["lines"], options["prompt_file"])
    plan = GridPlan(base, chosen, options["strengths"], jobs, options["batch_size"])
    total = len(chosen) * len(plan.strengths)
    click.echo(f"{counted(total * len(jobs), 'picture')}: {counted(len(jobs), 'prompt')}, {counted(total, 'column')}")
    columns = list(plan.draw(folder, click.echo))
    written = write_grid(folder, f"{name}: {counted(len(chosen), 'file')}", jobs, columns)
    click.echo(f"Written to {' and '.join(map(shown_path, written))}")


def _config(path: Path | None, model: str | None, overrides: tuple[str, ...]) -> TrainConfig:
    """The config of a file, or one for a base model alone. Raises ConfigError."""
    from lorakit.config.load import config_from_tables, read_config

    if path is not None:
        return read_config(path, overrides, catalog())
    if overrides:
        raise click.UsageError("--set is for keys of a config")
    tables = {"model": {"path": model}, "data": {"image_dir": ".", "resolution": 512}, "output": {"dir": "grid"}}
    try:
        return config_from_tables(tables, Path.cwd(), catalog())
    except ConfigError as error:
        if all(problem.key == "model.path" for problem in error.problems):
            raise
        more = Problem("--model", "is not enough for this model", "write a config with these keys, and give it instead")
        raise ConfigError([*error.problems, more]) from error


def _jobs(config: TrainConfig, lines: tuple[str, ...], file: Path | None) -> list[PreviewJob]:
    """The pictures to draw with each LoRA. Raises ConfigError where a prompt cannot be used."""
    from lorakit.previews.prompt_files import read_prompts
    from lorakit.previews.prompts import PromptSettings, preview_jobs

    if lines and not any(map(str.strip, lines)):
        raise click.UsageError("--prompt must not be empty")
    source: Path | tuple[str, ...] | None = file or lines or None
    settings = PromptSettings()
    if source is None:
        samples: Any = next((own for own in config.observers if own.name == "samples"), None)
        if samples is None:
            raise click.UsageError("give --prompt or --prompts, because the config draws no previews")
        source, settings = samples.prompts, samples
    return preview_jobs(read_prompts(source, settings).prompts, config.training.seed, config.model)
