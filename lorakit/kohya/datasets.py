"""The [data] section from sd-scripts' options: a dataset file, or folders named NUMBER_words."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.config.dataset_tables import SECTION_KEYS
from lorakit.config.toml_files import read_toml
from lorakit.errors import ConfigError, Problem
from lorakit.kohya.draft import Command, Draft, OptionStatus, Setting, Table
from lorakit.kohya.options_files import UNSAID

FOLDER_OPTIONS = ("train_data_dir", "reg_data_dir", "in_json")
"""Options that name the images if there is no dataset file."""

_PATHS = ("image_dir", "conditioning_data_dir", "metadata_file")
"""Keys of dataset files that hold paths."""

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Endings of the names of images that sd-scripts finds."""


_FILTER = "resize_interpolation"
_RESAMPLING = (
    "is absent: sd-scripts makes images smaller by averaging areas then, lorakit with a Lanczos filter, by which"
    f' latents differ by about 1 %. For the same, add {_FILTER} = "area" to the dataset; images that are enlarged'
    " are then interpolated linearly"
)


def write_data(command: Command, draft: Draft) -> None:
    """The datasets; what other options say of images and captions holds for all of them."""
    own = draft.sections.pop("data", {})
    draft.sections["data"] = {key: setting for key, setting in own.items() if key in SECTION_KEYS}
    workers = command.get("max_data_loader_n_workers")
    if "max_data_loader_n_workers" in command.given and workers > 0:
        draft.set("data", "workers", command.setting("max_data_loader_n_workers"))
    shared = {key: setting for key, setting in own.items() if key not in SECTION_KEYS}
    shared |= _resolution(command) | _face_crop(command, draft)
    # An image of 515 pixels gives the same latents as one of 512.
    steps, least = command.get("bucket_reso_steps"), 8
    if 0 < steps < least and command.script.bucket_multiple < least:
        draft.note("bucket_reso_steps", f"{steps} is {least} here, as latents have integer sizes in sd-scripts, too")
        shared["bucket_reso_steps"] = command.setting("bucket_reso_steps", least)
    if command.get("dataset_config"):
        _from_file(command, draft, shared)
    elif command.get("train_data_dir"):
        if _FILTER not in shared:
            draft.note_default(_FILTER, _RESAMPLING)
        _from_folders(command, draft, {**shared, **_caption_extension(command)})
    else:
        hint = "give --dataset_config or --train_data_dir"
        raise ConfigError([Problem("--dataset_config", "is missing", hint)])
    _check_bucket_steps(command, draft)


def _check_bucket_steps(command: Command, draft: Draft) -> None:
    """Raise ConfigError for a step between buckets that the script refuses."""
    multiple = command.script.bucket_multiple
    for own, _ in draft.datasets:
        table = {**draft.general, **own}
        steps, is_on = table.get("bucket_reso_steps"), table.get("enable_bucket")
        if is_on and is_on.value and steps and isinstance(steps.value, int) and steps.value % multiple:
            message = f"must be a multiple of {multiple} with {command.script.name}, not {steps.value}"
            key = steps.source if "bucket_reso_steps" in steps.source else f"{steps.source}: bucket_reso_steps"
            raise ConfigError([Problem(key, message, "--bucket_reso_steps=64 is usual")])


def _resolution(command: Command) -> Table:
    text = command.get("resolution")
    if text is None:
        return {}
    try:
        sides = [int(side) for side in text.split(",")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise ConfigError([Problem("--resolution", f"must be SIDE or WIDTH,HEIGHT in pixels, not {text!r}")])
    return {"resolution": command.setting("resolution", sides if len(sides) == 2 else sides[0])}


def _face_crop(command: Command, draft: Draft) -> Table:
    text = command.get("face_crop_aug_range")
    if text is None:
        return {}
    if command.get("enable_bucket"):
        draft.note("face_crop_aug_range", "has no effect with --enable_bucket")
        return {}
    try:
        low, high = (float(number) for number in text.split(","))
    except ValueError as error:
        problem = Problem("--face_crop_aug_range", f"must be two numbers, such as 2.0,4.0, not {text!r}")
        raise ConfigError([problem]) from error
    return {"face_crop_aug_range": command.setting("face_crop_aug_range", [low, high])}


def _caption_extension(command: Command) -> Table:
    name = "caption_extention" if command.get("caption_extention") else "caption_extension"
    extension = command.get(name)
    extension = extension if extension.startswith(".") else f".{extension}"
    return {"caption_extension": command.setting(name, extension)}


def _from_file(command: Command, draft: Draft, shared: Table) -> None:
    """The dataset file; its tables where they would mean something else when read from the config's folder."""
    for name in FOLDER_OPTIONS:
        if name in command.given:
            draft.note(name, "has no effect with --dataset_config")
    name = command.get("dataset_config")
    path = command.on_disk(name)
    if {"caption_extension", "caption_extention"} & command.given.keys():
        shared = {**shared, **_caption_extension(command)}
    if "dataset_repeats" in command.given:
        shared = {**shared, "num_repeats": command.setting("dataset_repeats")}
    try:
        tables = read_toml(path)
    except ValueError:  # reported by `check`
        tables = {}
    if tables and _FILTER not in shared and not _says(_FILTER, tables):
        draft.note_default(_FILTER, _RESAMPLING)
    if tables and (shared or _is_elsewhere(command, path, tables)):
        _copy(command, draft, tables, {**_caption_extension(command), **shared})
        return
    draft.set("data", "config", command.setting("dataset_config", command.path(name)))
    for key in shared:
        draft.note("dataset_config", f"is to say {key} = {shared[key].value!r}, from {shared[key].source}")
    if tables and not _says("caption_extension", tables):
        message = (
            f"{name} has no caption_extension: sd-scripts reads .caption files then, lorakit .txt files before those"
        )
        draft.note("caption_extension", message)


def _is_elsewhere(command: Command, path: Path, tables: Mapping[str, Any]) -> bool:
    """Whether relative paths in a dataset file lead elsewhere from the file than from where sd-scripts is called."""
    paths = [subset.get(key) for _, subsets in _datasets(tables) for subset in subsets for key in _PATHS]
    is_relative = any(isinstance(path, str) and not Path(path).is_absolute() for path in paths)
    return is_relative and path.absolute().parent != command.folder.absolute()


def _datasets(tables: Mapping[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The datasets of a file, each with its subsets; what is no table is left out."""
    return [
        ({key: value for key, value in table.items() if key != "subsets"}, _tables_in(table.get("subsets")))
        for table in _tables_in(tables.get("datasets"))
    ]


def _tables_in(found: object) -> list[dict[str, Any]]:
    return [table for table in found if isinstance(table, dict)] if isinstance(found, list) else []


def _general(tables: Mapping[str, Any]) -> Mapping[str, Any]:
    found = tables.get("general")
    return found if isinstance(found, dict) else {}


def _says(key: str, tables: Mapping[str, Any]) -> bool:
    """Whether a key counts for every subset of a dataset file."""
    return key in _general(tables) or all(
        key in own or all(key in subset for subset in subsets) for own, subsets in _datasets(tables)
    )


def _copy(command: Command, draft: Draft, tables: Mapping[str, Any], shared: Table) -> None:
    """Write a dataset file's tables, with what they leave open filled in from the command line."""
    name = Path(command.get("dataset_config")).name

    def table(values: Mapping[str, Any]) -> Table:
        return {
            key: Setting(command.path(value) if key in _PATHS and isinstance(value, str) else value, name)
            for key, value in values.items()
            if value is not None
        }

    draft.general = {**shared, **table(_general(tables))}
    draft.datasets = [(table(own), [table(subset) for subset in subsets]) for own, subsets in _datasets(tables)]


def _from_folders(command: Command, draft: Draft, shared: Table) -> None:
    """One dataset of the subfolders of --train_data_dir and --reg_data_dir."""
    folder = command.get("train_data_dir")
    if command.get("in_json"):
        subset = {"image_dir": command.setting("train_data_dir", command.path(folder))}
        if command.state("in_json") is OptionStatus.WORKS:
            subset["metadata_file"] = command.setting("in_json", command.path(command.get("in_json")))
        draft.datasets = [(shared, [{**subset, "num_repeats": command.setting("dataset_repeats")}])]
        return
    if "dataset_repeats" in command.given:
        draft.note("dataset_repeats", "has no effect: folder names give the number of repeats")
    subsets = _subsets(command, draft, "train_data_dir")
    if command.get("reg_data_dir") and command.state("reg_data_dir") is OptionStatus.WORKS:
        is_reg = {"is_reg": command.setting("reg_data_dir", value=True)}
        subsets += [{**subset, **is_reg} for subset in _subsets(command, draft, "reg_data_dir")]
    draft.datasets = [(shared, subsets)]


def _subsets(command: Command, draft: Draft, option: str) -> list[Table]:
    """The subfolders named NUMBER_words of a folder, in the order of their names."""
    name = command.get(option)
    folder = command.on_disk(name)
    try:
        subfolders = sorted(path for path in folder.iterdir() if path.is_dir())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if command.sources.get(option) != UNSAID:
            draft.note(option, f"{name} cannot be searched for folders named NUMBER_words: {reason}")
        return [{"image_dir": command.setting(option, command.path(name))}]
    found: list[Table] = []
    for subfolder in subfolders:
        number, _, words = subfolder.name.partition("_")
        if not _has_repeats(subfolder):
            draft.note(option, f"{subfolder.name} is ignored, as its name does not start with a number of repeats")
            continue
        path = command.path(os.path.join(name, subfolder.name))  # noqa: PTH118 - keeps the path as it was typed
        table = {"image_dir": command.setting(option, path), "num_repeats": Setting(int(number), "the folder's name")}
        found.append({**table, **({"class_tokens": Setting(words, "the folder's name")} if words else {})})
    if not found:
        raise ConfigError([_nothing_found(option, name, folder, subfolders)])
    return found


def _nothing_found(option: str, name: str, folder: Path, subfolders: Sequence[Path]) -> Problem:
    """What is wrong with a folder that has no folders named NUMBER_words: often it is one level off."""
    message = f"{name} has no folder with a name such as 10_cat"
    inside = [path for path in subfolders if any(map(_has_repeats, _folders_in(path)))]
    if inside:
        path = os.path.join(name, inside[0].name)  # noqa: PTH118 - keeps the path as it was typed
        return Problem(f"--{option}", f"{message}, but {path} has", f"--{option}={path}")
    if not any(path.suffix.lower() in _IMAGES for path in folder.iterdir()):
        return Problem(f"--{option}", message, "sd-scripts would find no images")
    if _has_repeats(folder.absolute()):
        parent = os.path.dirname(os.path.normpath(name)) or "."  # noqa: PTH120 - keeps the path as it was typed
        return Problem(f"--{option}", f"{name} is the folder with the images", f"give its parent: --{option}={parent}")
    hint = f"move them into {os.path.join(name, '10_cat')}: each is then trained 10 times per epoch"  # noqa: PTH118
    return Problem(f"--{option}", f"{message}, but contains images itself, which sd-scripts ignores", hint)


def _has_repeats(folder: Path) -> bool:
    """Whether the name of a folder starts with a number of repeats."""
    number = folder.name.partition("_")[0]
    return number.isdecimal() and int(number) > 0


def _folders_in(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []


def first_resolution(command: Command, draft: Draft) -> tuple[int, int] | None:
    """Width and height that images of the first dataset are scaled to; None where nothing says it."""
    if draft.datasets:
        setting = {**draft.general, **draft.datasets[0][0]}.get("resolution")
        found: object = setting.value if setting else None
    else:
        try:
            tables = read_toml(command.on_disk(command.get("dataset_config") or ""))
        except ValueError:  # reported by `check`
            return None
        own = next(iter(_datasets(tables)), ({}, []))[0]
        found = {**_general(tables), **own}.get("resolution")
    sides = [found] * 2 if isinstance(found, int) else found
    if isinstance(sides, list) and len(sides) == 2 and all(isinstance(side, int) for side in sides):
        return int(sides[0]), int(sides[1])
    return None
