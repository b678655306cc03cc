"""Where the parts of a Stable Diffusion model are stored, whichever way it is stored. Reads no weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from attrs import evolve, field, frozen

from lorakit.checkpoints import CheckpointSummary, HubModel, Location, Shapes, describe, read_json, summarize
from lorakit.errors import ModelError
from lorakit.models.families.sd import state_dict_keys as layout
from lorakit.models.families.sd.folders import fetched, find_weights, vae_config, vae_folder
from lorakit.models.families.sd.infer_config import clip_settings, open_clip_settings, unet_settings, vae_settings
from lorakit.models.families.sd.latents import check_latents, other_latents, other_scale
from lorakit.models.families.sd.structure import clip_shapes, unet_shapes, vae_shapes
from lorakit.models.weights.placement import TensorRef, TensorSlice

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
_EXPECTED = {"unet": unet_shapes, "vae": vae_shapes, "text_encoder": clip_shapes}
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
class CheckpointPart:
    """One part of a model: the file with its weights, its settings, and what its tensors are called there.

    A tensor's bare name is its name in the file without the part's prefix.
    """

    name: PartName
    file: Path
    """The file with the weights, or the index of the files that they are spread over."""
    settings: Mapping[str, Any] = field(repr=False)
    """Arguments of the part's module."""
    file_names: Mapping[str, TensorRef] = field(repr=False)
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
            raise ModelError(f"{self} lacks {_some(missing)}; the file is incomplete or another kind of model")
        for name, shape in wanted.items():
            stored = self.shape_of(name)
            if not _fits(stored, shape):
                raise ModelError(
                    f"{self} has another shape than expected: {self.rename(name)} is {stored}, not {shape}"
                )
        return {name: self.file_names[self.rename(name)] for name in wanted}

    def check(self) -> None:
        """A `ModelError` unless the file has the tensors of a module with the part's settings, and no others."""
        try:
            wanted = _EXPECTED[self.name](self.settings)
        except Exception as error:  # settings are whatever a stranger's file says
            raise ModelError(f"{self} has settings that make no sense ({_cut(error)}); it is of another kind") from None
        self.find(wanted)
        self.check_complete(wanted)

    def check_complete(self, wanted: Shapes) -> None:
        """A `ModelError` if the file has tensors of this part that the module, with all its tensors, has no use for."""
        left = sorted(self.shapes.keys() - {self.rename(name) for name in wanted})
        if left:
            raise ModelError(f"{self} has tensors that none of Stable Diffusion has: {_some(left)}")

    def __str__(self) -> str:
        return f"the {_IN_WORDS[self.name]} in {self.file}"


@frozen
class ModelCheckpoint:
    """A Stable Diffusion model, a single file or a diffusers folder, on disk or on the Hub."""

    location: Location
    vae: Location | None = None
    """A VAE to use instead of the model's own: a file, or a diffusers folder."""

    @cached_property
    def summary(self) -> CheckpointSummary:
        """What the model's headers or configs say."""
        return summarize(self.location)

    def part(self, name: PartName) -> CheckpointPart:
        """Where a part is; of a Hub model, the part's files are fetched. A `ModelError` if it is not there."""
        if name == "vae" and self.vae is not None:
            return vae_at(self.vae)
        if self.summary.kind == "folder":
            return _folder_part(self.location, f"{name}/", name)
        found = self._part_of_file(name)
        if found is None:
            raise ModelError(f"{self.summary.path} has no {_IN_WORDS[name]}; it is {describe(self.summary)}")
        return found

    def check(self) -> None:
        """A `ModelError` unless U-Net and text encoder are there, whole, and fit together; a Hub model passes."""
        if isinstance(self.location, HubModel):
            return
        unet, text_encoder = self.part("unet"), self.part("text_encoder")
        taken, given = unet.settings.get("cross_attention_dim"), text_encoder.settings.get("hidden_size")
        if taken != given:
            raise ModelError(
                f"{self.location}: the U-Net takes {taken} channels of text, the text encoder gives {given}"
            )
        unet.check()
        text_encoder.check()

    def check_vae(self) -> None:
        """A `ModelError` unless the VAE is there, whole, and makes latents of the right shape.

        Of a VAE on the Hub only the config is looked at; that of a Hub model passes.
        """
        if isinstance(self.vae, HubModel):
            check_latents(vae_config(self.vae), self.vae)
        elif self.vae is not None or not isinstance(self.location, HubModel):
            part = self.part("vae")
            check_latents(part.settings, part)
            part.check()

    @property
    def lacks_vae(self) -> bool:
        """Whether the model comes without a VAE."""
        if self.summary.kind == "folder":
            return "vae" not in self.summary.configs
        return not any(name.startswith(layout.VAE_PREFIX) for name in self.summary.tensors)

    def strange_vae(self) -> str:
        """Why the VAE's latents are not those of Stable Diffusion 1.x and 2.x, as far as files say it; or nothing."""
        location = self.location if self.vae is None else self.vae
        if isinstance(location, HubModel) or os.path.isdir(location):  # noqa: PTH112 - see `vae_at`
            own = self.vae is None
            return other_scale(self.summary.configs.get("vae", {}) if own else vae_config(location))
        return "" if self.vae is None else other_latents(summarize(location))

    def tokenizer_folder(self) -> Path | None:
        """The folder with the model's own tokenizer, or None if it brings none."""
        if self.summary.kind != "folder":
            return None
        folder = fetched(self.location, [f"tokenizer/{file}" for file in TOKENIZER_FILES]) / "tokenizer"
        return folder if any((folder / file).is_file() for file in TOKENIZER_FILES[:2]) else None

    def _part_of_file(self, name: PartName) -> CheckpointPart | None:
        path, tensors = self.summary.path, self.summary.tensors
        found = _part(name, path, tensors, _PREFIXES[name])
        return _open_clip_part(path, tensors) if found is None and name == "text_encoder" else found


def vae_at(location: Location) -> CheckpointPart:
    """A VAE of its own: a diffusers folder or Hub model, a file in either layout, or the VAE in a whole model's."""
    if isinstance(location, HubModel) or os.path.isdir(location):  # noqa: PTH112 - `Path.is_dir` may raise
        return _folder_part(location, vae_folder(location), "vae")
    summary = summarize(location)
    part = _part("vae", location, summary.tensors, layout.VAE_PREFIX) or _part("vae", location, summary.tensors, "")
    if part is None:
        raise ModelError(f"{location} holds no VAE; it is {describe(summary)}")
    return part


def _folder_part(location: Location, folder: str, name: PartName) -> CheckpointPart:
    """A part of a diffusers folder or Hub model, from the subfolder with its config and weights."""
    config, weights = find_weights(location, folder, _FOLDER_FILES[name], _IN_WORDS[name])
    settings, file = read_json(config), weights.file
    if _blocks(settings) > len(weights.tensors):
        raise ModelError(f"{config} tells of more layers than {file} has tensors; download it again")
    part = _part(name, file, weights.tensors, "", settings)
    if part is None:
        raise ModelError(f"{file} holds no {_IN_WORDS[name]}; download it again")
    factor = settings.get("scaling_factor", 1.0)
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ModelError(f"{config}: scaling_factor must be a positive number, not {factor!r}")
    return evolve(part, shards=weights.shards)


def _part(
    name: PartName, file: Path, tensors: Shapes, prefix: str, settings: Mapping[str, Any] | None = None
) -> CheckpointPart | None:
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
    return CheckpointPart(name, file, settings, dict(file_names), shapes, _renaming(name, prefix, shapes, settings))


def _open_clip_part(file: Path, tensors: Shapes) -> CheckpointPart | None:
    """The text encoder in the layout of OpenCLIP, without what Stable Diffusion has no use for; None if it is not."""
    places: dict[str, TensorRef] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for full, shape in tensors.items():
        bare = full.removeprefix(layout.OPEN_CLIP_PREFIX)
        if bare == full or not bare.startswith(_OPEN_CLIP_ROOTS):
            continue
        if ".in_proj_" in bare and shape and shape[0] % 3 == 0:
            for third in range(3):
                places[f"{bare}[{third}]"] = TensorSlice(full, third, 3)
                shapes[f"{bare}[{third}]"] = (shape[0] // 3, *shape[1:])
        else:
            places[bare], shapes[bare] = full, shape
    if not places:
        return None
    settings = _inferred("text_encoder", file, partial(open_clip_settings, shapes))
    unread = f"transformer.resblocks.{settings['num_hidden_layers']}."
    read = [bare for bare in places if not bare.startswith(unread)]
    places, shapes = {bare: places[bare] for bare in read}, {bare: shapes[bare] for bare in read}
    return CheckpointPart("text_encoder", file, settings, places, shapes, layout.open_clip_name)


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
        raise ModelError(
            f"the {_IN_WORDS[name]} in {file} lacks {missing.args[0]}; the file is incomplete or another kind of model"
        ) from None
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


def _cut(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
