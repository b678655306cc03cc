"""Where the parts of a base model are stored, whichever way they are stored. Reads no weights, imports no torch.

A family describes each part of its models by a `PartFormat`; a `ModelCheckpoint` then finds the parts in a single file
or a diffusers folder, on disk or on the Hub, and those that are stored separately at their own locations.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from attrs import evolve, field, frozen

from lorakit.checkpoints import (
    CheckpointSummary,
    HubModel,
    Location,
    Shapes,
    describe,
    is_other_part,
    read_json,
    summarize,
)
from lorakit.errors import ModelError
from lorakit.models.weights.folders import BLOCK_SCALES, NO_WEIGHTS, TensorRef, find_weights, part_folder
from lorakit.utils.wording import some

_REPEATED = (
    "num_hidden_layers", "num_layers", "num_single_layers", "layers_per_block", "transformer_layers_per_block",
)  # fmt: skip
"""Settings that are numbers of layers or blocks."""
DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""Names of the weights of diffusers' modules, best first."""
TRANSFORMERS_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights of transformers' modules, best first."""

Settings = Mapping[str, Any]
"""Arguments of a part's module, as config files hold them."""
Places = Mapping[str, TensorRef]
"""Place in the file of each of a part's tensors, by bare name."""


@frozen
class CheckpointPart:
    """One part of a model: the files with its weights, its settings, and what its tensors are called there.

    A tensor's bare name is its name in the file without the part's prefix.
    """

    format: PartFormat = field(repr=False)
    """What the family says of such parts."""
    file: Path
    """The file with the weights, or the index of the files that they are spread over."""
    settings: Settings = field(repr=False)
    """Arguments of the part's module."""
    file_names: Places = field(repr=False)
    """Place in the file of each of the part's tensors, by bare name."""
    shapes: Shapes = field(repr=False)
    """Shape in the file of each of the part's tensors, by bare name."""
    rename: Callable[[str], str] = field(repr=False)
    """From a tensor's name in the module to its bare name."""
    shards: tuple[Path, ...] = field(default=(), repr=False)
    """The files that the weights are spread over; none where they are in one."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files with the weights."""
        return self.shards or (self.file,)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape in the file of a tensor of the module."""
        return self.shapes[self.rename(name)]

    def find(self, wanted: Shapes) -> dict[str, TensorRef]:
        """Place in the file of each tensor of a module; a `ModelError` if some are missing or have another shape."""
        missing = [bare for name in wanted if (bare := self.rename(name)) not in self.shapes]
        if missing:
            raise ModelError(
                f"{self} lacks {some(missing, more=' and {} more')}; the file is incomplete or another kind of model"
            )
        for name, shape in wanted.items():
            stored = self.shape_of(name)
            # A 1×1 convolution and a linear layer stand for each other.
            if stored not in {shape, (*shape, 1, 1)} and (*stored, 1, 1) != shape:
                raise ModelError(
                    f"{self} has another shape than expected: {self.rename(name)} is {stored}, not {shape}"
                )
        return {name: self.file_names[self.rename(name)] for name in wanted}

    def check(self) -> None:
        """A `ModelError` unless the file has the tensors of a module with the part's settings, and no others."""
        try:
            wanted = self.format.shapes(self.settings)
        except Exception as error:  # settings are whatever a stranger's file says
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{self} has settings that make no sense ({reason}); it is of another kind") from None
        self.find(wanted)
        self.check_complete(wanted)

    def check_complete(self, wanted: Shapes) -> None:
        """A `ModelError` if the file has tensors of this part that the module, with all its tensors, has no use for."""
        left = sorted(self.shapes.keys() - {self.rename(name) for name in wanted})
        if left:
            raise ModelError(
                f"{self} has tensors that none of {self.format.family} has: {some(left, more=' and {} more')}"
            )

    def __str__(self) -> str:
        return f"the {self.format.title} in {self.file}"


@frozen(kw_only=True)
class PartFormat:
    """How files have one part of a family's models, in any of their layouts."""

    name: str
    """What diffusers calls the part's folder: `unet`."""
    title: str
    """What messages call it: `U-Net`."""
    family: str
    """What messages call the family: `Stable Diffusion`."""
    files: tuple[str, ...]
    """Names that the weights may have in a diffusers folder, best first."""
    prefix: str
    """What its tensors begin with in a single file of a whole model."""
    other_prefixes: tuple[str, ...] = ()
    """What else they may begin with there, tried in this order; an empty one may be the last."""
    inner_prefix: str = ""
    """What may follow after that, or begin the names in files of the part alone, and means nothing."""
    roots: tuple[str, ...]
    """What the bare names of its tensors begin with, in any layout; others are left out."""
    infer: Callable[[Shapes], dict[str, Any]]
    """Settings from the shapes of the tensors in a single file; raises KeyError with the name of a missing one."""
    shapes: Callable[[Settings], Shapes]
    """The tensors that a module with these settings has; raises for settings that make no sense."""
    renaming: Callable[[str, Shapes, Settings], Callable[[str], str]] = lambda _prefix, _shapes, _settings: str
    """The function from names in the module to bare names in a file with that prefix, those tensors and settings."""
    arrange: Callable[[Places, Shapes], tuple[Places, Shapes]] = lambda places, shapes: (places, shapes)
    """Puts places and shapes by bare name in another layout's names, where tensors of files are joined or cut there."""
    other_layout: Callable[[Path, Shapes], CheckpointPart | None] = lambda _file, _shapes: None
    """The part in a single file that has it in another layout; None where it does not."""

    def in_tensors(
        self, file: Path, tensors: Shapes, prefix: str, settings: Settings | None = None
    ) -> CheckpointPart | None:
        """The part whose tensors have this prefix in a file, or None; absent settings are inferred."""
        found = self._names_in(tensors, prefix)
        if not found:
            return None
        if any(bare.endswith(BLOCK_SCALES) for bare in found):
            raise ModelError(f"the {self.title} in {file} is in 4 bits (NVFP4); take the file in bf16 or fp8")
        file_names, shapes = self.arrange(found, {bare: tensors[full] for bare, full in found.items()})
        settings = self.inferred(file, shapes) if settings is None else settings
        return CheckpointPart(self, file, settings, file_names, shapes, self.renaming(prefix, shapes, settings))

    def in_file(self, file: Path, tensors: Shapes) -> CheckpointPart | None:
        """The part in a single file of a whole model, or None."""
        prefixes = (self.prefix, *self.other_prefixes)
        found = next((prefix for prefix in prefixes if self._names_in(tensors, prefix)), None)
        return self.other_layout(file, tensors) if found is None else self.in_tensors(file, tensors, found)

    def is_in(self, tensors: Shapes) -> bool:
        """Whether a single file of a whole model has some of the part's tensors."""
        return any(self._names_in(tensors, prefix) for prefix in (self.prefix, *self.other_prefixes))

    def _names_in(self, tensors: Shapes, prefix: str) -> dict[str, str]:
        """The names in a file of the part's tensors with this prefix, by bare name."""
        return {
            bare: full
            for full in tensors
            if full.startswith(prefix)
            and (bare := full.removeprefix(prefix).removeprefix(self.inner_prefix)).startswith(self.roots)
            and not bare.endswith((".position_ids", *NO_WEIGHTS))
        }

    def in_folder(self, location: Location, folder: str) -> CheckpointPart:
        """The part in a folder, with a slash behind it, of a location; a `ModelError` if it is not there."""
        config, weights = find_weights(location, folder, self.files, self.title)
        settings, file = read_json(config), weights.file
        if _layers(settings) > len(weights.tensors):
            raise ModelError(f"{config} tells of more layers than {file} has tensors; download it again")
        part = self.in_tensors(file, weights.tensors, "", settings)
        if part is None:
            raise ModelError(f"{file} holds no {self.title}; download it again")
        factor = settings.get("scaling_factor", 1.0)
        if not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise ModelError(f"{config}: scaling_factor must be a positive number, not {factor!r}")
        return evolve(part, shards=weights.shards)

    def alone(self, location: Location) -> CheckpointPart:
        """The part at its own location: a diffusers folder, a Hub model, or a file with it or with a whole model."""
        if isinstance(location, HubModel) or os.path.isdir(location):  # noqa: PTH112 - `Path.is_dir` may raise
            return self.in_folder(location, part_folder(location, self.name))
        summary = summarize(location)
        try:
            part = self.in_file(location, summary.tensors) or self.in_tensors(location, summary.tensors, "")
        except ModelError:
            if not is_other_part(summary, self.title):
                raise
            part = None  # other parts have tensors of the same names
        if part is None:
            raise ModelError(f"{location} holds no {self.title}; it is {describe(summary)}")
        return part

    def inferred(
        self, file: Path, shapes: Shapes, infer: Callable[[Shapes], dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """Settings from shapes; a `ModelError` if a tensor is missing or has a shape that no model has."""
        try:
            return (infer or self.infer)(shapes)
        except KeyError as missing:
            raise ModelError(
                f"the {self.title} in {file} lacks {missing.args[0]}; the file is incomplete or another kind of model"
            ) from None
        except (IndexError, TypeError, ValueError):
            raise ModelError(f"the {self.title} in {file} has tensors of other shapes than any model") from None


@frozen
class ModelCheckpoint:
    """A base model, a single file or a diffusers folder, on disk or on the Hub; parts may have their own locations."""

    formats: ClassVar[Mapping[str, PartFormat]]
    """The parts of the family's models, by name."""

    location: Location
    """Where the model is."""

    @property
    def separate(self) -> Mapping[str, Location]:
        """Where parts are that are not taken from the model itself, by name."""
        return {}

    @property
    def sources(self) -> Mapping[str, Location]:
        """All locations, by the words that metadata of LoRA files has for them: `sd_model`, `vae`."""
        return {"sd_model": self.location, **self.separate}

    @cached_property
    def summary(self) -> CheckpointSummary:
        """What the model's headers or configs say."""
        return summarize(self.location)

    def part(self, name: str) -> CheckpointPart:
        """Where a part is; of a Hub model, the part's files are fetched. A `ModelError` if it is not there."""
        part_format = self.formats[name]
        if name in self.separate:
            return part_format.alone(self.separate[name])
        if self.summary.kind == "folder":
            return part_format.in_folder(self.location, f"{name}/")
        found = part_format.in_file(self.summary.path, self.summary.tensors)
        if found is None:
            raise ModelError(f"{self.summary.path} has no {part_format.title}; it is {describe(self.summary)}")
        return found

    def lacks(self, name: str) -> bool:
        """Whether the model comes without a part, as far as headers or configs tell."""
        if self.summary.kind == "folder":
            return name not in self.summary.configs
        part, tensors = self.formats[name], self.summary.tensors
        return not part.is_in(tensors) and part.other_layout(self.summary.path, tensors) is None


def _layers(settings: Settings) -> int:
    """No fewer layers than a module with such settings would repeat others in."""
    levels = settings.get("block_out_channels")
    repeated = [len(levels) if isinstance(levels, list) else 1]
    for key in _REPEATED:
        value = settings.get(key)
        counts = [count for count in (value if isinstance(value, list) else [value]) if isinstance(count, int)]
        repeated.append(max([1, *counts]))
    return math.prod(repeated)
