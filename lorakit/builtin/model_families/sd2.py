"""Stable Diffusion 2.x."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from attrs import field, frozen
from attrs import validators as v

from lorakit import hookimpl
from lorakit.checkpoints import CheckpointSummary, HubModel, traits_of
from lorakit.components import ModelFamilyConfig
from lorakit.errors import ModelError, Problem
from lorakit.models.stable_diffusion.config import StableDiffusionConfig
from lorakit.models.stable_diffusion.settings import SD2_TEXT_LAYERS

if TYPE_CHECKING:
    from lorakit.models.noise import Prediction
    from lorakit.models.stable_diffusion.model import Variant


@frozen(kw_only=True)
class SD2Config(StableDiffusionConfig):
    """Stable Diffusion 2.x, base and 768-v; reads captions with OpenCLIP (Cherti et al., 2022, arXiv:2212.07143)."""

    name = "sd2"
    version = "2.x"
    title = "Stable Diffusion 2.x"

    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the U-Net predicts: the noise in base models, the velocity (`v_prediction`) in those for 768 pixels. When
    absent, what the model's folder says; a single file does not say it, and the noise is assumed."""
    clip_skip: int = field(default=1, validator=[v.ge(1), v.le(SD2_TEXT_LAYERS)])
    """Which layer of the text encoder is read, counted from the last that 2.x uses, which is 1; it is OpenCLIP's last
    but one, so 1 is right for nearly all models."""

    def warnings(self) -> Iterator[Problem]:
        """A single file whose prediction is not given; keys are field names."""
        try:
            location = self.stored().location
        except ModelError:
            return
        if self.prediction is None and not isinstance(location, HubModel) and location.is_file():
            hint = 'set "v_prediction" if it is a 768-v model, or "epsilon" to be rid of this warning'
            yield Problem("prediction", f"is absent and {location.name} does not say it, so epsilon is assumed", hint)

    def variant(self, prediction: Prediction) -> Variant:
        """How models of 2.x are run: short captions are filled up with token 0."""
        from lorakit.models.stable_diffusion.model import Variant

        kind = "768-v" if prediction == "v_prediction" else "512"
        return Variant(
            version="sd_v2",
            architecture=f"stable-diffusion-v2-{kind}/lora",
            prediction=prediction,
            clip_skip=self.clip_skip,
            max_token_length=self.max_token_length,
            pad_token=0,
        )


@hookimpl
def register_model_families() -> list[type[ModelFamilyConfig]]:
    """Stable Diffusion 2.x."""
    return [SD2Config]


@hookimpl
def detect_model_family(checkpoint: CheckpointSummary) -> str | None:
    """`sd2` for a U-Net of four input channels behind linear layers that attends to one text encoder of OpenCLIP."""
    traits = traits_of(checkpoint)
    if traits is None or not traits.linear_projection or traits.conditioned:
        return None
    encoders = ("clip",) if checkpoint.kind == "folder" else ("open_clip",)
    return "sd2" if traits.text_encoders == encoders and traits.in_channels == 4 else None
