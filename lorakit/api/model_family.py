"""The base of model families, and what a plugin answers about a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from lorakit.api.block_layout import BlockLayout
from lorakit.api.components import Component, ModelPart
from lorakit.api.lora_layout import LoRALayout
from lorakit.api.noise import DDPMSpec, NoiseSpec
from lorakit.errors import Problem

if TYPE_CHECKING:
    import torch

    from lorakit.models.interfaces import DiffusionModel


@frozen
class DetectedFamily:
    """What a plugin recognises a checkpoint as."""

    name: str | None
    """The family that trains it, as `model.family` names it; None for a base model that the plugin only knows."""
    title: str
    """What it is, in words that fit behind "is": `a Stable Diffusion 1.x model."""
    advice: str = ""
    """What to do with a model that cannot be trained; empty if nothing helps."""


@frozen
class CaptionLengths:
    """How long captions are for the text encoders of a model."""

    tokens: tuple[int, ...]
    """Tokens of each caption, before anything is cut off."""
    limit: int
    """How many are read; the rest is cut off."""


@frozen(kw_only=True)
class ModelFamilyConfig(Component):
    """A family of base models, and the model to train on."""

    kind = "model family"
    name_key = "family"
    product = "a DiffusionModel"
    product_methods = ("predict", "targets", "fingerprint", "free")
    parts: ClassVar[tuple[ModelPart, ...]] = ()
    """The parts that can have adapters."""
    default_parts: ClassVar[tuple[str, ...]] = ()
    """The names of those that get adapters where `network.parts` is absent; all of them when empty."""
    layout: ClassVar[BlockLayout | None] = None
    """How the blocks of its denoiser are numbered; None where they are not."""
    lora_layout: ClassVar[LoRALayout] = "kohya"
    """The layout that its LoRA files are written in: the one that most tools read. In `original`, each layer of the
    denoiser has an `original_path`."""
    lora_layouts: ClassVar[tuple[LoRALayout, ...]] = ("kohya",)
    """The layouts in which all layers of its denoiser have names, for copies of LoRA files."""
    layer_tags: ClassVar[tuple[str, ...]] = ()
    """All tags of its layers that can be adapted, by which `network.layers` chooses; with none it cannot."""
    title: ClassVar[str] = ""
    """Its display name, such as `Stable Diffusion 1.x`; defaults to its name."""
    overflows_fp16: ClassVar[bool] = False
    """Whether its denoiser overflows in fp16; `training.mixed_precision = "fp16"` is then refused."""
    web_uis: ClassVar[tuple[str, ...]] = ("AUTOMATIC1111", "Forge")
    """Web UIs that load its LoRA files by `<lora:NAME:1>` in prompts."""
    supports_weighted_captions: ClassVar[bool] = True
    """Whether its text encoders can weight words of captions, as `data.weighted_captions` asks for."""
    size_multiple: ClassVar[int] = 8
    """What the sides of images are multiples of, in pixels."""
    usual_resolution: ClassVar[int] = 512
    """Side of the images that its models are for, in pixels; `lorakit init` writes it."""
    preview_size: ClassVar[int] = 512
    """Default width and height of previews, in pixels."""
    preview_steps: ClassVar[int] = 30
    """Default number of sampling steps of previews."""
    preview_scale: ClassVar[float] = 7.5
    """Default guidance scale of previews."""
    preview_guidance: ClassVar[float | None] = None
    """Default of previews for the guidance scale that the denoiser takes as an input; None where it takes none."""
    preview_sampler: ClassVar[str] = ""
    """Default sampler of previews; that of the noise process when empty."""
    dataset_defaults: ClassVar[Mapping[str, object]] = {}
    """Defaults of keys of datasets that differ from those of other families: `{"max_bucket_reso": 2048}`."""
    adapter_title: ClassVar[str] = ""
    """What `lorakit.checkpoints.kinds` calls the models that LoRA files are for, where that is this family; when
    empty, that is not checked."""

    path: str
    """The base model: a `.safetensors` or `.ckpt` file, a diffusers folder, or a Hugging Face Hub id."""

    @property
    def noise_process(self) -> NoiseSpec:
        """The kind of its noise process, as far as that is known before the model's files are read."""
        return DDPMSpec()

    @property
    def loss_defaults(self) -> Mapping[str, object]:
        """Defaults of keys of `[loss]` that the model's files ask for: `{"zero_terminal_snr": True}`."""
        return {}

    def parts_named(self, names: Sequence[str] | None) -> tuple[ModelPart, ...]:
        """The parts with these names, in their order; unknown names are skipped. With None, the default ones."""
        known = {part.name: part for part in self.parts}
        return tuple(known[name] for name in names or self.default_parts or known if name in known)

    @property
    def text_encoders(self) -> int:
        """Number of text encoders."""
        return sum(len(part.encoders) for part in self.parts)

    def lora_name(self, name: str) -> str:
        """What sd-scripts calls a tensor of a LoRA file of any tool; the name itself where it is not known.

        Known without: `diffusion_model.`, `transformer.` and the like with any path, which becomes `lora_unet_…`.
        """
        return name

    def caption_lengths(self, captions: Sequence[str], weighted: bool) -> CaptionLengths | None:  # noqa: ARG002
        """The tokens of captions, for `lorakit data`; None where the family does not count them. Imports no torch.

        With `weighted`, brackets in captions are weights.
        """
        return None

    def warnings_of_captions(self, captions: Mapping[str, str], weighted: bool) -> Iterator[Problem]:  # noqa: ARG002
        """Warnings about captions, given by image name; keys are field names. Imports no torch.

        With `weighted`, brackets in captions are weights.
        """
        return iter(())

    def build(self, device: torch.device, dtype: torch.dtype) -> DiffusionModel:
        """The model, whose parts read their weights on first use.

        Called first of all components in a run.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method build")
