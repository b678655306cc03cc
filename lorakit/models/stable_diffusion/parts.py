"""Where the parts of a Stable Diffusion model are stored, whichever way it is stored. Reads no weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen

from lorakit.checkpoints import CheckpointSummary, HubModel, Location, Shapes, describe, read_json, summarize
from lorakit.errors import ModelError
from lorakit.models.places import Place, Rows
from lorakit.models.stable_diffusion import layout
from lorakit.models.stable_diffusion.settings import clip_settings, open_clip_settings, unet_settings, vae_settings

PartName = Literal["unet", "vae", "text_encoder"]

_IN_WORDS = {"unet": "U-Net", "vae": "VAE", "text_encoder": "text encoder"}
_PREFIXES = {"unet": layout.UNET_PREFIX, "vae": layout.VAE_PREFIX, "text_encoder": layout.TEXT_PREFIX}
_ROOTS = {
    "unet": ("",),
    "vae": ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
    "text_encoder": ("embeddings.", "encoder.", "final_layer_norm."),
}
_OPEN_CLIP_ROOTS = ("transformer.resblocks.", "token_embedding.", "positional_embedding", "ln_final.")
_INFERRED = {"unet": unet_settings, "vae": vae_settings, "text_encoder": clip_settings}
_FOLDER_FILES = {
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "text_encoder": ("model.safetensors", "pytorch_model.bin"),
}
_REPEATED = ("num_hidden_layers", "layers_per_block", "transformer_layers_per_block")
"""Settings that say how many there are of something."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
"""What a folder's tokenizer may consist of; one of the first two is there if it has one."""


@frozen
class StoredPart:
    """One part of a model: the file with its weights, its settings, and what its tensors are called there.

    A tensor's bare name is its name in the file without the part's prefix.
    """

    name: PartName
    file: Path
    settings: Mapping[str, Any] = field(repr=False)
    """Arguments of the part's module."""
    file_names: Mapping[str, Place] = field(repr=False)
    """Place in the file of each of the part's tensors, by bare name."""
    shapes: Shapes = field(repr=False)
    """Shape in the file of each of the part's tensors, by bare name."""
    rename: Callable[[str], str] = field(repr=False)
    """From a tensor's name in the module to its bare name."""

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape in the file of a tensor of the module."""
        return self.shapes[self.rename(name)]

    def find(self, wanted: Shapes) -> dict[str, Place]:
        """Place in the file of each tensor of a module; a `ModelError` if some are missing or have another shape."""
        missing = [bare for name in wanted if (bare := self.rename(name)) not in self.shapes]
        if missing:
            raise ModelError(f"{self} lacks {_some(missing)}; the file is incomplete or another kind of model")
        for name, shape in wanted.items():
            stored = self.shape_of(name)
            if not _fits(stored, shape):
                raise ModelError(
                    f"{self} has another shape than expected: {self.rename(name)} is {stored}, not {shape}"
                )
        return {name: self.file_names[self.rename(name)] for name in wanted}

    def check_complete(self, wanted: Shapes) -> None:
        """A `ModelError` if the file has tensors of this part that the module, with all its tensors, has no use for."""
        left = sorted(self.shapes.keys() - {self.rename(name) for name in wanted})
        if left:
            raise ModelError(f"{self} has tensors that none of Stable Diffusion has: {_some(left)}")

    def __str__(self) -> str:
        return f"the {_IN_WORDS[self.name]} in {self.file}"


@frozen
class StoredModel:
    """A Stable Diffusion model, a single file or a diffusers folder, on disk or on the Hub."""

    location: Location
    vae: Path | None = None
    """A VAE to use instead of the model's own: a file, or a diffusers folder."""

    @cached_property
    def summary(self) -> CheckpointSummary:
        """What the model's headers or configs say."""
        return summarize(self.location)

    def part(self, name: PartName) -> StoredPart:
        """Where a part is; of a Hub model, the part's files are fetched. A `ModelError` if it is not there."""
        if name == "vae" and self.vae is not None:
            return vae_at(self.vae)
        if self.summary.kind == "folder":
            return _folder_part(self._part_folder(name), name)
        found = _part(name, self.summary.path, self.summary.tensors, _PREFIXES[name])
        if found is None and name == "text_encoder":
            found = _open_clip_part(self.summary.path, self.summary.tensors)
        if found is None:
            raise ModelError(f"{self.summary.path} has no {_IN_WORDS[name]}; it is {describe(self.summary)}")
        return found

    def check(self) -> None:
        """A `ModelError` unless all parts are there and fit together, as far as the Hub need not be asked."""
        if self.vae is not None or not isinstance(self.location, HubModel):
            self.part("vae")
        if isinstance(self.location, HubModel):
            return
        taken = self.part("unet").settings.get("cross_attention_dim")
        given = self.part("text_encoder").settings.get("hidden_size")
        if taken != given:
            raise ModelError(
                f"{self.location}: the U-Net takes {taken} channels of text, the text encoder gives {given}"
            )

    def scheduler_settings(self) -> Mapping[str, Any]:
        """What a folder says of its noise schedule; empty for a single file."""
        if self.summary.kind != "folder":
            return {}
        file = self._fetched(["scheduler/scheduler_config.json"]) / "scheduler" / "scheduler_config.json"
        return read_json(file) if file.is_file() else {}

    def tokenizer_folder(self) -> Path | None:
        """The folder with the model's own tokenizer, or None if it brings none."""
        if self.summary.kind != "folder":
            return None
        folder = self._fetched([f"tokenizer/{file}" for file in TOKENIZER_FILES]) / "tokenizer"
        return folder if any((folder / file).is_file() for file in TOKENIZER_FILES[:2]) else None

    def _part_folder(self, name: PartName) -> Path:
        config = f"{name}/config.json"
        for weights in _FOLDER_FILES[name]:
            folder = self._fetched([config, f"{name}/{weights}"]) / name
            if (folder / weights).is_file():
                break
        return folder

    def _fetched(self, files: Sequence[str]) -> Path:
        return self.location.fetch(files) if isinstance(self.location, HubModel) else self.location


def vae_at(path: Path) -> StoredPart:
    """A VAE of its own: a diffusers folder, a file in either layout, or the VAE in a whole model's file."""
    if os.path.isdir(path):  # noqa: PTH112 - `Path.is_dir` raises where it may not look
        return _folder_part(path if (path / "config.json").is_file() else path / "vae", "vae")
    summary = summarize(path)
    part = _part("vae", path, summary.tensors, layout.VAE_PREFIX) or _part("vae", path, summary.tensors, "")
    if part is None:
        raise ModelError(f"{path} holds no VAE; it is {describe(summary)}")
    return part


def _folder_part(folder: Path, name: PartName) -> StoredPart:
    """A part of a diffusers folder, from the subfolder with its config and weights."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json, so there is no {_IN_WORDS[name]} in it")
    plain = [folder / file for file in _FOLDER_FILES[name]]
    candidates = plain + [file.with_suffix(f".fp16{file.suffix}") for file in plain]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise ModelError(f"{folder} has no weights; there should be a file {plain[0].name}")
    tensors, settings = summarize(file).tensors, read_json(folder / "config.json")
    if _blocks(settings) > len(tensors):
        raise ModelError(f"{folder / 'config.json'} tells of more layers than {file} has tensors; download it again")
    part = _part(name, file, tensors, "", settings)
    if part is None:
        raise ModelError(f"{file} holds no {_IN_WORDS[name]}; download it again")
    factor = settings.get("scaling_factor", 1.0)
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ModelError(f"{folder / 'config.json'}: scaling_factor must be a positive number, not {factor!r}")
    return part


def _part(
    name: PartName, file: Path, tensors: Shapes, prefix: str, settings: Mapping[str, Any] | None = None
) -> StoredPart | None:
    """The part whose tensors have this prefix in the file, or None if there are none; absent settings are inferred."""
    file_names = {
        bare: full
        for full in tensors
        if full.startswith(prefix)
        and (bare := full.removeprefix(prefix).removeprefix("text_model.")).startswith(_ROOTS[name])
        and not bare.endswith(".position_ids")
    }
    if not file_names:
        return None
    shapes = {bare: tensors[full] for bare, full in file_names.items()}
    if settings is None:
        settings = _inferred(name, file, partial(_INFERRED[name], shapes))
    return StoredPart(name, file, settings, dict(file_names), shapes, _renaming(name, prefix, shapes, settings))


def _open_clip_part(file: Path, tensors: Shapes) -> StoredPart | None:
    """The text encoder in the layout of OpenCLIP, without what Stable Diffusion has no use for; None if it is not."""
    places: dict[str, Place] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for full, shape in tensors.items():
        bare = full.removeprefix(layout.OPEN_CLIP_PREFIX)
        if bare == full or not bare.startswith(_OPEN_CLIP_ROOTS):
            continue
        if ".in_proj_" in bare and shape and shape[0] % 3 == 0:
            for third in range(3):
                places[f"{bare}[{third}]"] = Rows(full, third, 3)
                shapes[f"{bare}[{third}]"] = (shape[0] // 3, *shape[1:])
        else:
            places[bare], shapes[bare] = full, shape
    if not places:
        return None
    settings = _inferred("text_encoder", file, partial(open_clip_settings, shapes))
    unread = f"transformer.resblocks.{settings['num_hidden_layers']}."
    read = [bare for bare in places if not bare.startswith(unread)]
    places, shapes = {bare: places[bare] for bare in read}, {bare: shapes[bare] for bare in read}
    return StoredPart("text_encoder", file, settings, places, shapes, layout.open_clip_name)


def _blocks(settings: Mapping[str, Any]) -> int:
    """No fewer layers than a module with such settings would have that others are repeated in."""
    levels = settings.get("block_out_channels")
    repeated = [len(levels) if isinstance(levels, list) else 1]
    for key in _REPEATED:
        value = settings.get(key)
        counts = [count for count in (value if isinstance(value, list) else [value]) if isinstance(count, int)]
        repeated.append(max([1, *counts]))
    return math.prod(repeated)


def _inferred(name: PartName, file: Path, infer: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `infer` makes of a part's shapes; a `ModelError` if a tensor that it needs is missing."""
    try:
        return infer()
    except KeyError as missing:
        raise ModelError(f"the {_IN_WORDS[name]} in {file} lacks {missing}; it is another kind of model") from None
    except (IndexError, TypeError, ValueError):
        raise ModelError(f"the {_IN_WORDS[name]} in {file} has tensors of other shapes than any model") from None


def _renaming(name: PartName, prefix: str, shapes: Shapes, settings: Mapping[str, Any]) -> Callable[[str], str]:
    """The function from a tensor's name in the module to its bare name in a file with these tensors."""
    if name == "unet" and prefix:
        return partial(layout.original_unet_name, settings=settings)
    if name == "vae" and any(bare.startswith("encoder.down.") for bare in shapes):
        return partial(layout.original_vae_name, settings=settings)
    if name == "vae" and any(".attentions.0.query." in bare for bare in shapes):
        return layout.old_vae_name
    return str


def _fits(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a tensor can be used as it is stored; a 1×1 convolution and a linear layer stand for each other."""
    return stored in {wanted, (*wanted, 1, 1)} or (*stored, 1, 1) == wanted


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
