"""Stable Diffusion 2.x."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.hookspecs import hookimpl
from lorakit.api.model_family import DetectedFamily, ModelFamilyConfig
from lorakit.checkpoints import CheckpointSummary, HubModel
from lorakit.errors import ModelError, Problem
from lorakit.models.families.sd.config import StableDiffusionConfig
from lorakit.models.families.sd.detect import detect
from lorakit.models.families.sd.infer_config import SD2_TEXT_LAYERS

if TYPE_CHECKING:
    from lorakit.diffusion.noise_schedule import Prediction
    from lorakit.models.families.sd.model import Variant


@frozen(kw_only=True)
class SD2Config(StableDiffusionConfig):
    """Stable Diffusion 2.x, base and 768-v, with OpenCLIP's text encoder (Cherti et al., 2022, arXiv:2212.07143)."""

    name = "sd2"
    title = adapter_title = "Stable Diffusion 2.x"
    usual_resolution = 768

    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the U-Net predicts: noise (`epsilon`) in base models, velocity (`v_prediction`) in 768-pixel models. If
    absent, detected from a folder's scheduler, a file's key `v_pred` or header, or a `.yaml` of the same name; else
    noise."""
    clip_skip: int = field(default=1, validator=[v.ge(1), v.le(SD2_TEXT_LAYERS)])
    """Text encoder layer to use, counted from the last one that 2.x uses (OpenCLIP's penultimate), which is 1; 1 is
    right for nearly all models."""

    def warnings(self) -> Iterator[Problem]:
        """What all families warn of, and a prediction that nothing says; keys are field names."""
        yield from super().warnings()
        try:
            location, stated = self.stored().location, self.stated()
        except ModelError:
            return
        if self.prediction is None and stated.prediction is None:
            name = location if isinstance(location, HubModel) else location.name
            hint = 'set "v_prediction" if it is a 768-v model, or "epsilon" to be rid of this warning'
            yield Problem("prediction", f"is absent and {name} does not say it, so epsilon is assumed", hint)

    def variant(self, prediction: Prediction) -> Variant:
        """How models of 2.x are run: short captions are filled up with token 0."""
        from lorakit.models.families.sd.model import Variant

        velocity = prediction == "v_prediction"
        return Variant(
            version="sd_v2_v" if velocity else "sd_v2",
            architecture=f"stable-diffusion-v2-{'768-v' if velocity else '512'}/lora",
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
def detect_model_family(checkpoint: CheckpointSummary) -> DetectedFamily | None:
    """`sd2` for a U-Net of four input channels that attends to one text encoder of OpenCLIP."""
    found = detect(checkpoint)
    return found if found and found.name == SD2Config.name else None
