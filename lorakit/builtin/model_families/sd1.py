"""Stable Diffusion 1.x."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.hookspecs import hookimpl
from lorakit.api.model_family import DetectedFamily, ModelFamilyConfig
from lorakit.checkpoints import CheckpointSummary
from lorakit.models.families.sd.config import StableDiffusionConfig
from lorakit.models.families.sd.detect import detect

if TYPE_CHECKING:
    from lorakit.diffusion.noise_schedule import Prediction
    from lorakit.models.families.sd.model import Variant


@frozen(kw_only=True)
class SD1Config(StableDiffusionConfig):
    """Stable Diffusion 1.x (Rombach et al., 2022, arXiv:2112.10752)."""

    name = "sd1"
    title = adapter_title = "Stable Diffusion 1.x"

    clip_skip: int = field(default=1, validator=[v.ge(1), v.le(12)])
    """Text encoder layer to use, counted from the last, which is 1."""

    def variant(self, prediction: Prediction) -> Variant:
        """How models of 1.x are run: short captions are filled up with the end token."""
        from lorakit.models.families.sd.model import Variant

        return Variant(
            version="sd_v1_v" if prediction == "v_prediction" else "sd_v1",
            architecture="stable-diffusion-v1/lora",
            prediction=prediction,
            clip_skip=self.clip_skip,
            max_token_length=self.max_token_length,
        )


@hookimpl
def register_model_families() -> list[type[ModelFamilyConfig]]:
    """Stable Diffusion 1.x."""
    return [SD1Config]


@hookimpl
def detect_model_family(checkpoint: CheckpointSummary) -> DetectedFamily | None:
    """`sd1` for a U-Net of four input channels that attends to one text encoder of CLIP."""
    found = detect(checkpoint)
    return found if found and found.name == SD1Config.name else None
