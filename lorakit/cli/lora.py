"""`lorakit lora`: what is done with LoRA files after training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lorakit.cli.options import catalog, print_warnings

if TYPE_CHECKING:
    from lorakit.lora_tools.output import Written
    from lorakit.networks.adapter_file import Precision

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)
_EXACT = 5e-5
"""A relative error that would be shown as 0.00%."""


def _output(name: str = "LORA") -> Callable[[CommandT], CommandT]:
    return click.option(
        "-o", "output", type=_PATH, required=True, metavar=name,
        help="The file to write, .safetensors; it must not exist.",
    )  # fmt: skip


def _precision(default: str | None = None) -> Callable[[CommandT], CommandT]:
    absent = "" if default else " That of the files if absent."
    return click.option(
        "--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default=default, show_default=bool(default),
        help=f"Data type of the weights in the file.{absent}",
    )  # fmt: skip


def _weighted(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[tuple[Path, float]]:
    """Files with a weight behind the last equals sign, `cat.safetensors=0.8`; 1 where there is none."""
    pairs = []
    for value in values:
        path, sign, weight = value.rpartition("=")
        is_file = os.path.isfile(value)  # noqa: PTH113 - raises nothing
        if not value or (sign and not path and not is_file):
            raise click.BadParameter(f"{value!r} names no file: write FILE=WEIGHT, such as cat.safetensors=0.8")
        if not sign or is_file:
            pairs.append((Path(value), 1.0))
            continue
        try:
            pairs.append((Path(path), float(weight)))
        except ValueError:
            raise click.BadParameter(f"{value}: write FILE=WEIGHT with a number, such as {path}=0.8") from None
    return pairs


@click.group(
    epilog="""\b
Example:
  lorakit lora info cat.safetensors
  lorakit lora merge cat.safetensors=0.8 ink.safetensors=0.5 -o inked-cat.safetensors""",
)
def lora() -> None:
    """Look into LoRA files, merge, resize, convert, average, extract and bake them.

    Everything is computed on the CPU in float32. No file is overwritten, and what is written is read back.
    """


@lora.command(
    "info",
    short_help="Say what is in LoRA files, and how two differ.",
    epilog="""\b
Example:
  lorakit lora info cat.safetensors
  lorakit lora info cat-000004.safetensors cat-000008.safetensors
  lorakit lora info cat.safetensors --config > again.toml""",
)
@click.option("--config", is_flag=True, help="Print a config that repeats the training, as far as metadata tells.")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=_PATH)
def info_command(files: tuple[Path, ...], config: bool) -> None:
    """Say what is in LoRA files: kind, ranks, training, tags, strength by block, damage.

    Of two files, what differs is shown, too.
    """
    from lorakit.lora_tools.info import of_one_or_more
    from lorakit.utils.wording import printable

    if not config:
        for line in of_one_or_more(files):
            click.echo(printable(line))
        return
    if len(files) > 1:
        raise click.UsageError("--config takes one file")
    click.echo(_config_of(files[0]), nl=False)


def _config_of(path: Path) -> str:
    """The config that repeats the training of a file."""
    from lorakit.kohya.command_line import parse
    from lorakit.kohya.conversion import convert
    from lorakit.kohya.draft import Setting, to_text
    from lorakit.kohya.options_files import UNSAID, Given
    from lorakit.lora_tools.adapters import open_lora
    from lorakit.lora_tools.training_options import (
        cleans_captions,
        folders,
        is_by_lorakit,
        own_keys,
        script_of,
        training_options,
    )

    file = open_lora(path)
    script = script_of(file)
    options = parse(training_options(file, script), script)
    given = Given(options, dict.fromkeys(("train_data_dir", "output_dir"), UNSAID), script=script)
    draft = convert(given, Path.cwd(), Path.cwd(), catalog())
    if not cleans_captions(file):
        draft.sections["model"].pop("fix_text", None)
    if is_by_lorakit(file):  # what sd-scripts does by default does not count
        draft.defaults.clear()
        for dataset, _ in draft.datasets:
            dataset.pop("caption_extension", None)
    for section, keys in own_keys(file, script).items():
        for key, value in keys.items() if section != "optimizer" or "lr" in draft.sections[section] else ():
            draft.set(section, key, Setting(value, "the file's metadata"))
    print_warnings(draft.remarks)
    notes = [f"From the metadata of {path.name}. Paths are placeholders: set model.path and image_dir.", *folders(file)]
    return "".join(f"# {note}\n" for note in notes) + to_text(draft)


@lora.command(
    "merge",
    short_help="Add up LoRA files, each with a weight.",
    epilog="""\b
Example:
  lorakit lora merge cat.safetensors=0.8 ink.safetensors=0.5 -o inked-cat.safetensors
  lorakit lora merge cat.safetensors ink.safetensors --rank 32 -o inked-cat.safetensors""",
)
@click.option("--rank", type=click.IntRange(1), help="Rank of the result; if absent, the sum of the ranks, exactly.")
@_precision()
@_output()
@click.argument("files", metavar="FILE[=WEIGHT]...", nargs=-1, required=True, callback=_weighted)
def merge_command(files: list[tuple[Path, float]], output: Path, rank: int | None, precision: Precision | None) -> None:
    """Add up the updates of LoRA files, each times its WEIGHT, which is 1 if absent.

    Ranks, alphas and the layouts of the files may differ; they must be for the same kind of base model. With --rank the
    result is the best approximation of that rank (SVD), and how much it lacks is printed.
    """
    from lorakit.lora_tools import merge

    _say(merge(files, output, rank=rank, precision=precision), "the sum of the updates")


@lora.command(
    "resize",
    short_help="Lower the rank of a LoRA; turn LoHa or LoKr into LoRA.",
    epilog="""\b
Example:
  lorakit lora resize cat.safetensors --rank 8 -o cat-8.safetensors
  lorakit lora resize cat.safetensors --energy 0.95 -o cat-small.safetensors""",
)
@click.option("--rank", type=click.IntRange(1), help="Rank of all layers; those that have less keep theirs.")
@click.option(
    "--energy", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
    help="Instead of a rank: the share of each layer's squared norm to keep, such as 0.95.",
)  # fmt: skip
@_precision()
@_output()
@click.argument("file", type=_PATH)
def resize_command(
    file: Path, output: Path, rank: int | None, energy: float | None, precision: Precision | None
) -> None:
    """Write FILE at a lower rank: for each layer the best approximation (SVD).

    A LoHa or LoKr becomes a LoRA. Of a DoRA, the magnitudes stay.
    """
    from lorakit.lora_tools import resize

    if (rank is None) == (energy is None):
        raise click.UsageError("Give either --rank or --energy.")
    _say(resize(file, output, rank=rank, energy=energy, precision=precision), f"the updates of {file}")


@lora.command(
    "convert",
    short_help="Rename the tensors for another tool.",
    epilog="""\b
Example:
  lorakit lora convert cat.safetensors --to diffusers -o cat-diffusers.safetensors""",
)
@click.option(
    "--to", type=click.Choice(["kohya", "diffusers", "comfyui"]), required=True, help="Whose layout to write."
)
@_output()
@click.argument("file", type=_PATH)
def convert_command(file: Path, output: Path, to: Any) -> None:
    """Write FILE in the layout of sd-scripts (kohya), of diffusers and PEFT, or of ComfyUI.

    Takes LoRA and DoRA in any of these layouts. The numbers stay the same, and the way back gives the same file.
    """
    from lorakit.lora_tools import convert
    from lorakit.utils.wording import counted

    done = convert(file, output, to=to)
    rounded = ""
    if done.rounded:
        layers = counted(len(done.rounded), "layer")
        rounded = f"; in {layers} numbers were rounded, as alpha / rank is no power of two"
    click.echo(f"Wrote {done.path}{rounded}.")


@lora.command(
    "average",
    short_help="Average several saves of a run.",
    epilog="""\b
Example:
  lorakit lora average cat-000006.safetensors cat-000008.safetensors cat.safetensors -o cat-mean.safetensors
  lorakit lora average cat-*.safetensors --ema 0.7 -o cat-ema.safetensors""",
)
@click.option(
    "--ema", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="DECAY",
    help="Moving average over the saves, ordered by their steps: each counts DECAY times as much as the next.",
)  # fmt: skip
@_precision()
@_output()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=_PATH)
def average_command(files: tuple[Path, ...], output: Path, ema: float | None, precision: Precision | None) -> None:
    """Average the updates of several saves of a run, at their rank.

    The mean of the updates has a higher rank; the result is the best approximation (SVD), and how much it lacks is
    printed.
    """
    from lorakit.lora_tools import average

    _say(average(files, output, ema=ema, precision=precision), "the mean of the updates")


@lora.command(
    "extract",
    short_help="Extract a LoRA from the difference of two models.",
    epilog="""\b
Example:
  lorakit lora extract v1-5-pruned.safetensors tuned.safetensors --rank 32 -o tuned-lora.safetensors""",
)
@click.option("--rank", type=click.IntRange(1), default=32, show_default=True, help="Rank of the LoRA.")
@click.option(
    "--conv-rank", type=click.IntRange(1),
    help="Rank of 3x3 convolutions. If absent, only transformers and text encoders are adapted (LoRA-LierLa).",
)  # fmt: skip
@_precision("fp16")
@_output()
@click.argument("base", type=_PATH)
@click.argument("tuned", type=_PATH)
def extract_command(base: Path, tuned: Path, output: Path, **options: Any) -> None:
    """Write what TUNED has changed of BASE as a LoRA.

    Both are models of the same family, each a .safetensors or .ckpt file or a diffusers folder. They are read layer by
    layer.
    """
    from lorakit.lora_tools import extract
    from lorakit.utils.wording import counted, some

    done = extract(base, tuned, output, **options)
    _say(done, "the differences of these layers")
    if done.unchanged:
        click.echo(f"  {counted(done.unchanged, 'layer')} did not change")
    if done.left_out:
        layers = counted(len(done.left_out), "layer")
        click.echo(
            f"  {layers} changed and got no adapter: {some(done.left_out, most=1)}; --conv-rank adapts those, too"
        )


@lora.command(
    "bake",
    short_help="Bake LoRA files into a base model.",
    epilog="""\b
Example:
  lorakit lora bake v1-5-pruned.safetensors cat.safetensors=0.8 -o cat-model.safetensors""",
)
@_output("MODEL")
@click.argument("base", type=_PATH)
@click.argument("files", metavar="FILE[=WEIGHT]...", nargs=-1, required=True, callback=_weighted)
def bake_command(base: Path, files: list[tuple[Path, float]], output: Path) -> None:
    """Write the base model BASE with LoRA files baked in, each with its WEIGHT, which is 1 if absent.

    BASE is a file, .safetensors or .ckpt, or a diffusers folder; then MODEL is one, too. Takes LoRA, DoRA, LoHa and
    LoKr. Tensors without an adapter are copied; the data types stay.
    """
    from lorakit.lora_tools import bake
    from lorakit.utils.wording import counted

    done = bake(base, files, output)
    click.echo(f"Wrote {done.path}: {counted(done.changed, 'layer')} changed, {counted(done.copied, 'tensor')} copied.")


def _say(done: Written, exact: str) -> None:
    """Say what was written, and how far it is from what it approximates."""
    from lorakit.utils.wording import counted, file_size

    low, high = min(done.ranks.values()), max(done.ranks.values())
    ranks = f"rank {high}" if low == high else f"ranks {low} to {high}"
    size = file_size(done.path.stat().st_size)
    click.echo(f"Wrote {done.path}: {counted(len(done.ranks), 'layer')}, {ranks}, {size}.")
    if done.worst is not None and done.error < _EXACT:
        click.echo(f"  It equals {exact}.")
    elif done.worst is not None:
        worst = f"; most in {done.worst.key}, {done.worst.relative:.2%}" if len(done.errors) > 1 else ""
        click.echo(f"  It lacks {done.error:.2%} of {exact}, by norm{worst}.")
