"""Files of a part in a diffusers folder or Hub model, one with all weights or an index and several; places in them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from attrs import field, frozen

from lorakit.checkpoints import HubModel, Location, Shapes, read_json, summarize
from lorakit.errors import ModelError
from lorakit.utils.safe_paths import list_files
from lorakit.utils.wording import some

_VARIANTS = ("", ".fp16", ".fp32", ".bf16", ".non_ema", ".ema")
"""What may be in the names of weights in front of their ending: nothing, or what `variant` of diffusers is; the most
usual first. Weights that are no running average of those of training (`non_ema`) are a model as well."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".msgpack", ".onnx", ".h5", ".ckpt", ".pth", ".pt")
"""What the names of files with weights end with, of any library."""
SCALE_ENDS = (".scale_weight", ".weight_scale")
"""What the names of scales end with by which ComfyUI's files in fp8 multiply a weight, in place of `.weight`."""
NO_WEIGHTS = (*SCALE_ENDS, ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
"""What the names of tensors end with that say how such a file is quantized."""
BLOCK_SCALES = ".weight_scale_2"
"""The same of scales in formats of 4 bits with scales for blocks (NVFP4)."""
_SHARD = re.compile(r"\w[\w.-]*")


@frozen
class TensorSlice:
    """Some rows of a stored tensor: a part of its first side."""

    name: str
    """Name of the stored tensor."""
    start: int
    """The first row."""
    stop: int
    """The row after the last."""


@frozen
class TransposedTensor:
    """A stored matrix with rows and columns exchanged."""

    name: str
    """Name of the stored matrix."""


@frozen
class JoinedTensors:
    """Several stored tensors, or some of their rows, one below the other."""

    parts: tuple[str | TensorSlice, ...]
    """From top to bottom."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the stored tensors."""
        return tuple(part if isinstance(part, str) else part.name for part in self.parts)


TensorRef = str | TensorSlice | TransposedTensor | JoinedTensors
"""All of the stored tensor of that name, some of its rows, its transpose, or several one below the other."""


def stored_names(place: TensorRef) -> tuple[str, ...]:
    """The names of the stored tensors at a place."""
    return place.names if isinstance(place, JoinedTensors) else (place if isinstance(place, str) else place.name,)


def shape_at(place: TensorRef, tensors: Shapes) -> tuple[int, ...]:
    """The shape of what is at a place, from those of the stored tensors; raises KeyError where one is missing."""
    if isinstance(place, JoinedTensors):
        shapes = [shape_at(part, tensors) for part in place.parts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if isinstance(place, TensorSlice):
        return (place.stop - place.start, *tensors[place.name][1:])
    return tensors[place] if isinstance(place, str) else tensors[place.name][::-1]


@frozen
class Weights:
    """The weights of one part: in one file, or spread over several that an index lists."""

    file: Path
    """The file, or the index."""
    tensors: Shapes = field(repr=False)
    """Shape of each tensor."""
    shards: tuple[Path, ...] = ()
    """The files that an index lists."""


def fetched(location: Location, files: Sequence[str]) -> Path:
    """The local folder with those of the files that there are; downloads those of a Hub model."""
    return location.fetch(files) if isinstance(location, HubModel) else location


def part_folder(location: Location, part: str) -> str:
    """Where in a folder or Hub model a part is: in `vae/` beside other parts, or right there, which is empty."""
    root = fetched(location, ["config.json", f"{part}/config.json"])
    has_parts = (root / part / "config.json").is_file() or not (root / "config.json").is_file()
    return f"{part}/" if has_parts else ""


def part_config(location: Location, part: str, title: str) -> Mapping[str, Any]:
    """What the config says of a part in a folder or on the Hub; a `ModelError` if there is none."""
    file = fetched(location, ["config.json", f"{part}/config.json"]) / part_folder(location, part) / "config.json"
    if not file.is_file():
        raise ModelError(f"{location} holds no {title} as diffusers stores it: there is no {part}/config.json in it")
    return read_json(file)


def find_weights(location: Location, folder: str, names: Sequence[str], title: str) -> tuple[Path, Weights]:
    """The config and the weights of a part in a subfolder; `names` are those that its weights may have, best first.

    Files of a Hub model are fetched one by one until there is one. A `ModelError` if something is missing.
    """
    config = fetched(location, [f"{folder}config.json"]) / folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{config.parent} has no config.json, so there is no {title} in it")
    # Each name, of one file or of an index; then the same of the next variant.
    variants = [(variant, *name.rpartition(".")) for variant in _VARIANTS for name in names]
    files = ((f"{stem}{variant}.{end}", f"{stem}.{end}.index{variant}.json") for variant, stem, _, end in variants)
    for name in chain.from_iterable(files):
        file = fetched(location, [f"{folder}config.json", folder + name]) / folder / name
        if file.is_file():
            is_index = name.endswith(".json")
            return config, _sharded(location, folder, file) if is_index else Weights(file, summarize(file).tensors)
    others = [name for name in sorted(list_files(config.parent)) if name.endswith(WEIGHT_SUFFIXES)]
    only = f", and there is only {some(others)}" if others else ""
    raise ModelError(f"{config.parent} has no weights; there should be a file {names[0]}{only}")


def _sharded(location: Location, folder: str, index: Path) -> Weights:
    """The weights in all files that an index lists; a `ModelError` if some are missing."""
    places: Mapping[str, str] = read_json(index).get("weight_map", {})
    named = places.values() if isinstance(places, Mapping) else ()
    # Only files in the index's own folder.
    if not named or not all(isinstance(name, str) and _SHARD.fullmatch(name) for name in named):
        raise ModelError(f"{index} does not say which files hold the weights; download it again")
    names = sorted(set(named))
    root = fetched(location, [folder + name for name in (index.name, *names)]) / folder
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        cure = "download it, too" if len(missing) == 1 else "download them, too"
        raise ModelError(f"{root} lacks {', '.join(missing[:3])}, which {index.name} lists; {cure}")
    tensors: dict[str, tuple[int, ...]] = {}
    for file in (root / name for name in names):
        own = summarize(file).tensors
        lost = next((name for name, place in places.items() if place == file.name and name not in own), None)
        if lost is not None or own.keys() & tensors.keys():
            fault = f"lacks {lost}" if lost is not None else "repeats tensors of another"
            raise ModelError(f"{file} {fault}, other than {index.name} says; download it again")
        tensors |= own
    return Weights(index, tensors, tuple(root / name for name in names))
