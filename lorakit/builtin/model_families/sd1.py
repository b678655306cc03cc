"""Stable Diffusion 1.x."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import field, frozen
from attrs import validators as v

from lorakit import hookimpl
from lorakit.checkpoints import CheckpointSummary, locate, traits_of
from lorakit.components import ModelFamilyConfig
from lorakit.errors import ModelError, Problem
from lorakit.models.stable_diffusion.parts import StoredModel

if TYPE_CHECKING:
    import torch

    from lorakit.models.protocol import DiffusionModel


@frozen(kw_only=True)
class SD1Config(ModelFamilyConfig):
    """Stable Diffusion 1.x (Rombach et al., 2022, arXiv:2112.10752)."""

    name: ClassVar[str] = "sd1"

    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the U-Net predicts, the noise or the velocity; when absent, what the model's folder says, or the noise."""
    vae: Path | None = None
    """A VAE to use instead of the model's own: a file, or a diffusers folder."""
    clip_skip: int = field(default=1, validator=[v.ge(1), v.le(12)])
    """Which layer of the text encoder is read, counted from the last, which is 1."""
    max_token_length: Literal[75, 150, 225] = 75
    """Longest caption in tokens; what is longer is cut off."""

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the files, as far as it shows without reading weights; keys are field names."""
        try:
            self._stored().check()
        except ModelError as error:
            yield Problem("path", str(error))

    def build(self, device: torch.device, dtype: torch.dtype) -> DiffusionModel:
        """The model, its weights not read yet: each part is read when it is first asked for."""
        from lorakit.models.stable_diffusion.model import StableDiffusion, Variant

        stored = self._stored()
        stated = stored.scheduler_settings().get("prediction_type")
        variant = Variant(
            version="sd_v1",
            architecture="stable-diffusion-v1/lora",
            prediction=self.prediction or ("v_prediction" if stated == "v_prediction" else "epsilon"),
            clip_skip=self.clip_skip,
            max_token_length=self.max_token_length,
        )
        return StableDiffusion(stored, variant, device, dtype)

    def _stored(self) -> StoredModel:
        return StoredModel(locate(self.path, Path()), self.vae)


@hookimpl
def register_model_families() -> list[type[ModelFamilyConfig]]:
    """Stable Diffusion 1.x."""
    return [SD1Config]


@hookimpl
def detect_model_family(checkpoint: CheckpointSummary) -> str | None:
    """`sd1` for a U-Net of four input channels behind 1×1 convolutions that attends to one text encoder of CLIP."""
    traits = traits_of(checkpoint)
    if traits is None or traits.linear_projection or traits.conditioned:
        return None
    return "sd1" if traits.text_encoders == ("clip",) and traits.in_channels == 4 else None
