"""What the families of Stable Diffusion have in common in the config file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import evolve, field, frozen

from lorakit.api.block_layout import BlockLayout
from lorakit.api.components import ModelPart
from lorakit.api.lora_layout import LoRALayout
from lorakit.api.model_family import CaptionLengths
from lorakit.api.noise import DDPMSpec, NoiseSpec
from lorakit.checkpoints import (
    HubModel,
    ModelPath,
    StatedPrediction,
    locate,
    stated_prediction,
)
from lorakit.checkpoints.lora_names import own_name
from lorakit.errors import ModelError, Problem
from lorakit.models.families.base_weights import BaseWeightsConfig
from lorakit.models.families.sd.checkpoint import SDCheckpoint
from lorakit.models.families.sd.detect import recognise
from lorakit.models.families.sd.state_dict_keys import LAYER_TAGS, LAYOUT, TEXT_ENCODER, UNET

if TYPE_CHECKING:
    import torch

    from lorakit.config.train_config import TrainConfig
    from lorakit.diffusion.noise_schedule import Prediction
    from lorakit.models.families.sd.model import StableDiffusion, Variant
    from lorakit.models.interfaces import DiffusionModel


def _text(path: str | Path | None) -> ModelPath | None:
    return None if path is None else ModelPath(str(path))


@frozen(kw_only=True)
class StableDiffusionConfig(BaseWeightsConfig):
    """A U-Net with CLIP's text encoders; a family says its parts, its checkpoints and its variant."""

    parts: ClassVar[tuple[ModelPart, ...]] = (UNET, TEXT_ENCODER)
    layout: ClassVar[BlockLayout | None] = LAYOUT
    lora_layouts: ClassVar[tuple[LoRALayout, ...]] = ("kohya", "diffusers")
    layer_tags: ClassVar[tuple[str, ...]] = LAYER_TAGS
    checkpoint_type: ClassVar[type[SDCheckpoint]] = SDCheckpoint
    """Finds the model's parts."""
    usual_vae: ClassVar[str] = "stabilityai/sd-vae-ft-mse"
    """A VAE for the family on the Hub."""

    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the U-Net predicts: noise (`epsilon`) or velocity; detected from the model's files if absent, else noise."""
    vae: ModelPath | None = field(default=None, converter=_text)
    """VAE to use instead of the model's: a file, a diffusers folder, or a Hub id. The VAEs of Stable Diffusion 1.x and
    2.x and that of SDXL have the same tensors; the wrong one is detected, with a warning, only by a folder's
    `scaling_factor`, a file's header, or as part of a whole model."""
    no_half_vae: bool = False
    """Run the VAE in float32 regardless of `training.mixed_precision`, for VAEs that overflow in half precision."""
    max_token_length: Literal[75, 150, 225] = 75
    """Maximum caption length in tokens; longer captions are truncated."""
    fix_text: bool = False
    """Clean captions and prompts with ftfy before they become tokens, as sd-scripts, AUTOMATIC1111 and Forge do: curly
    quotes, ligatures, full-width letters and HTML entities become plain ones. ComfyUI, InvokeAI and diffusers with
    transformers 5 do not."""

    @property
    def noise_process(self) -> NoiseSpec:
        """DDPM, with what the U-Net predicts where the config or the model says it."""
        return DDPMSpec(prediction=self._prediction)

    @property
    def loss_defaults(self) -> Mapping[str, object]:
        """Zero terminal SNR, where the files say so and the model predicts velocity."""
        if self._prediction != "v_prediction":
            return {}
        try:
            return {"zero_terminal_snr": True} if self.stated().snr_source else {}
        except ModelError:
            return {}

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the files, as far as it shows without reading weights; keys are field names."""
        yield from super().problems()
        try:
            stored = self._base
            found = None if isinstance(stored.location, HubModel) else recognise(stored.summary)
        except ModelError as error:
            yield Problem("path", str(error))
            return
        expected = f"a {self.title} model"
        if found is not None and found.title != expected:
            hint = found.advice or "leave model.family out, and it is recognised"
            yield Problem("path", f"{stored.location} is {found.title}, not {expected}", hint)
            return
        try:
            if self.vae is None and stored.lacks("vae"):
                hint = f'give a file, a folder or a Hub id, such as "{self.usual_vae}"'
                yield Problem("vae", f"is missing, and {stored.location} has no VAE", hint)
            else:
                self.stored().check_vae()
        except ModelError as error:
            yield Problem("path" if self.vae is None else "vae", str(error))
        try:
            stored.check()
        except ModelError as error:
            yield Problem("path", str(error))

    def warnings(self) -> Iterator[Problem]:
        """A prediction that contradicts what the model says, and a VAE for other latents; keys are field names."""
        try:
            stated, strange = self.stated(), self.stored().strange_vae()
        except ModelError:
            return
        if self.prediction is not None and stated.prediction not in (None, self.prediction):
            message = f'is "{self.prediction}", but the model says {stated.prediction} in {stated.source}'
            yield Problem("prediction", message, "leave it out to go by the model")
        if strange:
            key = "path" if self.vae is None else "vae"
            message = f"{getattr(self, key)} has a VAE that is not for {self.title}: {strange}"
            yield Problem(key, message, f'give a VAE for this model, such as model.vae = "{self.usual_vae}"')

    def build(self, device: torch.device, dtype: torch.dtype) -> DiffusionModel:
        """The model; each part's weights are loaded on first use."""
        variant = evolve(
            self.variant(self._prediction or "epsilon"), no_half_vae=self.no_half_vae, fix_text=self.fix_text
        )
        return self.model_type()(self.stored(), variant, device, dtype, merging=self.merging())

    def warnings_with(self, config: TrainConfig) -> Iterator[Problem]:
        """A VAE in full precision in a run that has no other, and another noise schedule than the model's."""
        if self.no_half_vae and config.training.mixed_precision == "no":
            yield Problem("no_half_vae", "has no effect without training.mixed_precision")
        try:
            stated = self.stated()
        except ModelError:
            return
        if self.loss_defaults and not config.loss.zero_terminal_snr:
            message = f"{self.path} was trained with zero terminal SNR, as {stated.snr_source} says"
            yield Problem("path", message, "leave loss.zero_terminal_snr out to go by the model")

    def caption_lengths(self, captions: Sequence[str], weighted: bool) -> CaptionLengths:
        """The tokens of captions in CLIP's vocabulary, or in the model's own."""
        from lorakit.models.families.sd.tokenizer import CaptionTokenizer

        stored = self.stored()
        # Nothing is downloaded to count; models on the Hub have CLIP's tokens.
        folder = None if isinstance(stored.location, HubModel) else stored.tokenizer_folder()
        lengths = CaptionTokenizer(folder, fix_text=self.fix_text).lengths(captions, weighted)
        return CaptionLengths(tuple(lengths), self.max_token_length)

    def warnings_of_captions(self, captions: Mapping[str, str], weighted: bool) -> Iterator[Problem]:
        """Captions that have more tokens than are read."""
        # A token is one byte or more.
        long = {name: text for name, text in captions.items() if len(text.encode()) > self.max_token_length}
        if not long:
            return
        lengths = self.caption_lengths(list(long.values()), weighted).tokens
        cut = [(length, name) for length, name in zip(lengths, long, strict=True) if length > self.max_token_length]
        if not cut:
            return
        tokens, name = max(cut)
        message = f"{self.max_token_length} cuts off the end of {len(cut)} of {len(captions)} captions"
        larger = " or ".join(str(length) for length in (150, 225) if length > self.max_token_length)
        hint = f"set it to {larger}, or write shorter captions" if larger else "write shorter captions"
        yield Problem("max_token_length", f"{message}; the longest, of {name}, has {tokens} tokens", hint)

    def model_type(self) -> type[StableDiffusion]:
        """The class of the model."""
        from lorakit.models.families.sd.model import StableDiffusion

        return StableDiffusion

    def lora_name(self, name: str) -> str:
        """What sd-scripts calls a tensor of a LoRA file of any tool."""
        return own_name(name)

    def variant(self, prediction: Prediction) -> Variant:
        """How this family's models are run, and what LoRA files call them."""
        raise NotImplementedError(f"{type(self).__name__} does not say its variant")

    def stored(self) -> SDCheckpoint:
        """Where the model's parts are; a `ModelError` if a path leads nowhere."""
        return self._base if self.vae is None else evolve(self._base, vae=locate(self.vae, Path()))

    @cached_property
    def _base(self) -> SDCheckpoint:
        """The model with its own VAE, whose header is read once; a `ModelError` if the path leads nowhere."""
        return self.checkpoint_type(locate(self.path, Path()))

    def stated(self) -> StatedPrediction:
        """What the model says of its prediction; a `ModelError` if it cannot be read."""
        return stated_prediction(self._base.summary)

    @property
    def _prediction(self) -> Literal["epsilon", "v_prediction"] | None:
        """What the U-Net predicts; None where neither the config nor the model says it."""
        try:
            return self.prediction or self.stated().prediction
        except ModelError:
            return None
