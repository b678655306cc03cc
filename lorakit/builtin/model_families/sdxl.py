"""Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.api.hookspecs import hookimpl
from lorakit.api.model_family import DetectedFamily, ModelFamilyConfig
from lorakit.checkpoints import CheckpointSummary
from lorakit.checkpoints.lora_names import own_name_xl
from lorakit.errors import Problem
from lorakit.models.families.sd.config import StableDiffusionConfig
from lorakit.models.families.sd.detect import detect
from lorakit.models.families.sdxl.checkpoint import SDXLCheckpoint
from lorakit.models.families.sdxl.parts import LAYOUT, TEXT_ENCODER_1, TEXT_ENCODER_2, UNET

if TYPE_CHECKING:
    from lorakit.config.train_config import TrainConfig
    from lorakit.diffusion.noise_schedule import Prediction
    from lorakit.models.families.sd.model import Variant
    from lorakit.models.families.sdxl.model import StableDiffusionXL


@frozen(kw_only=True)
class SDXLConfig(StableDiffusionConfig):
    """Stable Diffusion XL (Podell et al., 2023, arXiv:2307.01952), and what was trained from it, such as Pony."""

    name = "sdxl"
    title = adapter_title = "Stable Diffusion XL"
    parts = (UNET, TEXT_ENCODER_1, TEXT_ENCODER_2)
    layout = LAYOUT
    lora_layouts = ("kohya", "original", "diffusers")
    checkpoint_type = SDXLCheckpoint
    usual_vae = "madebyollin/sdxl-vae-fp16-fix"
    usual_resolution = preview_size = 1024
    preview_steps = 28
    preview_scale = 7.0
    preview_sampler = "euler_a"
    dataset_defaults = {"resolution": (1024, 1024), "max_bucket_reso": 2048}  # noqa: RUF012 - a ClassVar of the base

    def warnings_with(self, config: TrainConfig) -> Iterator[Problem]:
        """What all families warn of, and half precision in which the VAE overflows."""
        yield from super().warnings_with(config)
        if config.training.mixed_precision == "fp16" and not self.no_half_vae and self.vae is None:
            message = "SDXL's VAE overflows in fp16; images that do are encoded again in float32, which takes longer"
            yield Problem("no_half_vae", message, f'set it to true, or set model.vae = "{self.usual_vae}"')

    def model_type(self) -> type[StableDiffusionXL]:
        """The class of the model."""
        from lorakit.models.families.sdxl.model import StableDiffusionXL

        return StableDiffusionXL

    def lora_name(self, name: str) -> str:
        """What sd-scripts calls a tensor of a LoRA file of any tool."""
        return own_name_xl(name)

    def variant(self, prediction: Prediction) -> Variant:
        """How models are run, and what LoRA files call them."""
        from lorakit.models.families.sd.model import Variant

        return Variant(
            # Web UIs tell the family by its beginning, so it is the same for models that predict velocity.
            version="sdxl_base_v1-0",
            architecture="stable-diffusion-xl-v1-base/lora",
            implementation="https://github.com/Stability-AI/generative-models",
            prediction=prediction,
            clip_skip=None,
            max_token_length=self.max_token_length,
        )


@hookimpl
def register_model_families() -> list[type[ModelFamilyConfig]]:
    """Stable Diffusion XL."""
    return [SDXLConfig]


@hookimpl
def detect_model_family(checkpoint: CheckpointSummary) -> DetectedFamily | None:
    """`sdxl` for a U-Net of four input channels that takes image sizes and attends to two text encoders."""
    found = detect(checkpoint)
    return found if found and found.name == SDXLConfig.name else None
