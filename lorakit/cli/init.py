"""A config to start from, filled in for images and a model: the keys that a beginner needs, or every key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import tomlkit
from attrs import frozen

from lorakit.api.components import ModelPart, OptimizerConfig
from lorakit.api.model_family import ModelFamilyConfig
from lorakit.api.preset import Preset, PresetConfig
from lorakit.checkpoints import HubModel, locate, summarize
from lorakit.config.dump import STARTER_VALUES, starter
from lorakit.errors import ConfigError, LorakitError, Problem
from lorakit.plugins.build import build_component
from lorakit.plugins.catalog import Catalog

_EPOCHS = 10
_COMMENT_COLUMN = 40
_SMALL = 768
"""Side of images, in pixels, up to which a step without checkpoints fits on most GPUs."""


@frozen
class Images:
    """A folder of images."""

    folder: Path
    count: int
    with_caption: int
    """How many have a caption file beside them."""
    word: str | None
    """The words in the name of a folder as sd-scripts has it, `20_fluffy dog`."""


@frozen(kw_only=True)
class Start:
    """What a config is written for."""

    preset: Preset
    images: Images | None = None
    model: str | None = None
    """Path or Hub id of the base model."""
    family: type[ModelFamilyConfig] = ModelFamilyConfig
    """Its family; the base of all where it is not known."""
    optimizer: type[OptimizerConfig]

    @property
    def repeats_and_epochs(self) -> tuple[int, int]:
        """How often each image is repeated, and the epochs, for about the usual number of steps at batch size 1."""
        count = self.images.count if self.images else 20
        repeats = max(1, round(self.preset.steps / _EPOCHS / count))
        return repeats, _EPOCHS if repeats > 1 else max(1, round(self.preset.steps / count))

    @property
    def is_known(self) -> bool:
        """Whether the model's family is."""
        return self.family is not ModelFamilyConfig

    @property
    def default_parts(self) -> Sequence[ModelPart]:
        """The parts of the family's models that get adapters."""
        known = self.family.default_parts
        return [part for part in self.family.parts if not known or part.name in known]

    @property
    def word(self) -> str:
        """The words for the subject in captions."""
        return (self.images.word if self.images else None) or self.preset.word

    def prompts(self) -> str:
        """A file of prompts for previews."""
        lines = [prompt.format(self.word) for prompt in self.preset.prompts]
        note = "" if self.images and self.images.word else f"; replace {self.word.split()[-1]} with your own word"
        return "\n".join([f"# A prompt in each line{note}.", *lines, ""])


def plan_start(catalog: Catalog, preset: str, images: Path | None, model: str | None, optimizer: str) -> Start:
    """What a short config is written for. Raises ConfigError or PluginError for what is not there."""
    return Start(
        preset=build_component(catalog.find(PresetConfig, preset)()),
        images=look_at_images(images) if images else None,
        model=model,
        family=(look_at_model(model, catalog) if model else None) or ModelFamilyConfig,
        optimizer=catalog.find(OptimizerConfig, optimizer),
    )


def look_at_images(folder: Path) -> Images:
    """The images in a folder. Raises ConfigError if there are none, and names its subfolders that have some."""
    from lorakit.data.images.formats import EXTENSIONS

    if not folder.is_dir():
        raise ConfigError([Problem("--images", f"{folder} is not a folder", "name the folder with the images")])
    own = _images_in(folder, EXTENSIONS)
    if not own:
        inside = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and _images_in(path, EXTENSIONS)]
        hint = f"they are in {', '.join(map(repr, inside[:3]))}" if inside else "put the images there first"
        raise ConfigError([Problem("--images", f"{folder} contains no images", hint)])
    with_caption = sum(any(path.with_suffix(end).is_file() for end in (".txt", ".caption")) for path in own)
    word = re.fullmatch(r"\d+_(.+)", folder.resolve().name)
    return Images(folder, len(own), with_caption, word[1] if word else None)


def _images_in(folder: Path, extensions: frozenset[str]) -> list[Path]:
    try:
        found = list(folder.iterdir())
    except OSError as error:
        raise ConfigError([Problem("--images", f"{folder} cannot be read: {error.strerror}")]) from error
    return [path for path in found if path.suffix.lower() in extensions and not path.name.startswith(".")]


def look_at_model(model: str, catalog: Catalog) -> type[ModelFamilyConfig] | None:
    """The family of a base model; None for one on the Hub. Raises ConfigError for what cannot be trained on."""
    try:
        location = locate(model, Path.cwd())
        if isinstance(location, HubModel):
            return None
        summary = summarize(location)
    except (LorakitError, OSError, RuntimeError) as error:
        raise ConfigError([Problem("--model", str(error))]) from error
    found = catalog.detect_model_family(summary)
    if found.name is None:
        message = f"{model} is {found.title}; no installed plugin trains it"
        raise ConfigError([Problem("--model", message, found.advice)])
    return catalog.find(ModelFamilyConfig, found.name)


def short_config(start: Start, path: Path) -> str:
    """The text of a config that is to be written to `path`."""
    sections = (_model, _data, _network, _optimizer, _lr_scheduler, _training, _output, _previews)
    parts = [_preamble(start, path), *("\n".join(section(start, path)) for section in sections)]
    return "\n\n".join(parts) + "\n"


def _preamble(start: Start, path: Path) -> str:
    repeats, epochs = start.repeats_and_epochs
    count = start.images.count if start.images else 20
    length = f"{count} images, {repeats} times an epoch, {epochs} epochs: {count * repeats * epochs} steps"
    usual = start.preset.steps
    return (
        f"# {'' if start.images else 'With '}{length}; about {usual} are a good first try.\n"
        f"# Check it: lorakit check {path.name}   Train: lorakit train {path.name}\n"
        "# Paths are relative to this file. All keys: lorakit init --full every_key.toml"
    )


def _model(start: Start, path: Path) -> Iterator[str]:
    yield "[model]"
    model = _model_path(start.model, path) if start.model else "v1-5-pruned.safetensors"
    yield _line("path", model, 'or a Hub id: "stable-diffusion-v1-5/stable-diffusion-v1-5"')
    if not start.model or not start.is_known:
        return
    for problem in start.family(path=str(locate(start.model, Path.cwd()))).problems():
        if problem.message.startswith("is missing"):
            example = re.search(r'"([^"]+)"', problem.hint)
            yield _line(problem.key, example[1] if example else "", problem.hint)


def _data(start: Start, path: Path) -> Iterator[str]:
    images = start.images
    yield "[data]"
    folder = _relative(images.folder, path) if images else "photos"
    yield _line("image_dir", folder, "captions beside the images: 001.jpg, 001.txt")
    named = images and (images.word or not images.with_caption)
    yield _line("class_tokens", start.word, "caption of images without a .txt file", is_off=not named)
    side = start.family.usual_resolution
    size = "768 for 768-v models, 512 for base ones" if side == 768 else "what the base model is for"
    yield _line("resolution", side, size)
    yield _line("enable_bucket", True, "keep aspect ratios")
    yield _line("num_repeats", start.repeats_and_epochs[0], "repeats of each image per epoch")
    yield _line("batch_size", 1, "images per step; more need more memory")


def _network(start: Start, _: Path) -> Iterator[str]:
    yield "[network]"
    has_convolutions = "resnet" in start.family.layer_tags or not start.is_known
    yield _line("name", "lierla", '"c3lier" adapts convolutions too' if has_convolutions else "")
    yield _line("rank", start.preset.rank, "higher: more detail, larger file")
    yield _line("alpha", start.preset.alpha, "scale: updates are multiplied by alpha / rank")


def _optimizer(start: Start, _: Path) -> Iterator[str]:
    own = start.optimizer
    lr = _rate(own)
    yield "[optimizer]"
    yield _line("name", own.name, "others: docs/how-to/optimizers.md")
    if own.finds_learning_rate:
        yield _line("lr", lr, "leave it at 1: the optimizer finds the learning rate")
    else:
        yield _line("lr", lr, "for other optimizers: lion 3e-5, dadaptation and prodigy 1")
    for key, value in own.usual_options.items():
        yield _line(key, value, f"usual with {own.name}")
    trains_text = any(part.encoders for part in start.default_parts) or not start.is_known
    if own.supports_group_lrs and not own.finds_learning_rate and trains_text:
        share = start.preset.text_encoder_share
        several = sum(bool(part.encoders) for part in start.family.parts) > 1
        off = "0 trains none, [1e-5, 0] the first alone" if several else "0 does not train the text encoder"
        yield _line("text_encoder_lr", float(f"{lr * share:.2g}"), f"lower than lr; {off}")


def _rate(optimizer: type[OptimizerConfig]) -> float:
    if optimizer.usual_lr is not None:
        return optimizer.usual_lr
    return float(attrs.fields_dict(optimizer)["lr"].default)  # type: ignore[arg-type]


def _lr_scheduler(start: Start, _: Path) -> Iterator[str]:
    yield "[lr_scheduler]"
    if start.optimizer.schedule_free or start.optimizer.finds_learning_rate:
        yield _line("name", "constant", "")
        return
    yield _line("name", "cosine", '"constant" does not change')
    yield _line("warmup_steps", 0.05, "fraction of the run")


def _training(start: Start, _: Path) -> Iterator[str]:
    yield "[training]"
    yield _line("max_epochs", start.repeats_and_epochs[1], "")
    older = "" if start.family.overflows_fp16 else ", fp16 on older GPUs"
    yield _line("mixed_precision", "auto", f"bf16 on RTX 30 and newer{older}, float32 on CPUs")
    yield _line("cuda_graphs", "auto", "on NVIDIA GPUs, if a measurement finds it faster")
    is_large = start.family.usual_resolution > _SMALL
    yield _line("gradient_checkpointing", True, "less memory, a third more time", is_off=not is_large)


def _output(start: Start, _: Path) -> Iterator[str]:
    yield "[output]"
    yield _line("dir", "out", "")
    name = re.sub(r"[^\w-]+", "_", start.images.word).strip("_") if start.images and start.images.word else ""
    yield _line("name", name or "my_lora", "of the file: out/NAME.safetensors")
    yield _line("save_every_n_epochs", 1, "to compare afterwards")
    yield ""
    yield "[saver]"
    yield _line("precision", "fp16", "half the size of fp32, same quality")


def _previews(start: Start, path: Path) -> Iterator[str]:
    yield "[[observers]]"
    yield _line("name", "samples", "preview images, in out/sample")
    yield _line("prompts", prompts_beside(path).name, "")
    yield _line("every_n_epochs", 1, "")
    side = start.family.usual_resolution
    if side != start.family.preview_size:
        yield _line("width", side, "")
        yield _line("height", side, "")


def prompts_beside(path: Path) -> Path:
    """The file of prompts for previews that a config at `path` names."""
    return path.parent / "prompts.txt"


def full_config(catalog: Catalog, path: Path, images: Path | None, model: str | None) -> str:
    """The text of a config with every key that is to be written to `path`, for a model's family.

    Raises ConfigError for images or a model that cannot be used.
    """
    values = {section: {**settings} for section, settings in STARTER_VALUES.items()}
    if images:
        values["data"]["image_dir"] = _relative(look_at_images(images).folder, path)
    if model:
        values["model"] = {"path": _model_path(model, path)}
        if family := look_at_model(model, catalog):
            values["model"]["family"] = family.name
            values["data"] |= {**family.dataset_defaults, "resolution": family.usual_resolution}
    return starter(catalog, values)


def _model_path(model: str, config: Path) -> str:
    """A base model as the config is to name it; Hub ids stay."""
    is_hub_id = isinstance(locate(model, Path.cwd()), HubModel)
    return model if is_hub_id else _relative(Path(model).expanduser(), config)


def _relative(path: Path, config: Path) -> str:
    """A path as the config is to name it: from its folder where that leads down, with slashes on all systems."""
    own, folder = Path(os.path.abspath(path)), Path(os.path.abspath(config)).parent  # noqa: PTH100 - keeps links
    return (own.relative_to(folder) if own.is_relative_to(folder) else own).as_posix()


def _line(key: str, value: object, comment: str, *, is_off: bool = False) -> str:
    """A key with its value and a comment beside it; one that is off is itself a comment."""
    setting = f"{'# ' if is_off else ''}{key} = {_toml(value)}"
    return f"{f'{setting}  ':<{_COMMENT_COLUMN}}# {comment}" if comment else setting


def _toml(value: object) -> str:
    if isinstance(value, float):
        short = re.sub(r"\.?0*e-0?", "e-", f"{value:.5e}")
        return short if 0 < value < 1e-3 and float(short) == value else repr(value)
    return str(tomlkit.item(value).as_string())
