"""What the families Stable Diffusion 1.x and 2.x have in common in the config file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import evolve, field, frozen
from attrs import validators as v

from lorakit.blocks import STABLE_DIFFUSION, BlockLayout
from lorakit.checkpoints import HubModel, describe, locate, summarize, traits_of
from lorakit.checkpoints.lora_files import lora_names
from lorakit.checkpoints.lora_kinds import adapter_kind
from lorakit.components import ModelFamilyConfig
from lorakit.errors import AdapterError, ModelError, Problem
from lorakit.models.stable_diffusion.parts import StoredModel

if TYPE_CHECKING:
    import torch

    from lorakit.config.sections import TrainConfig
    from lorakit.models.noise import Prediction
    from lorakit.models.protocol import DiffusionModel
    from lorakit.models.stable_diffusion.model import Variant


@frozen(kw_only=True)
class StableDiffusionConfig(ModelFamilyConfig):
    """Stable Diffusion with one text encoder; a family says its version and its variant."""

    version: ClassVar[Literal["1.x", "2.x"]]
    """The version of Stable Diffusion."""
    layout: ClassVar[BlockLayout | None] = STABLE_DIFFUSION

    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the U-Net predicts, the noise or the velocity; when absent, what the model's folder says, or the noise."""
    vae: Path | None = None
    """A VAE to use instead of the model's own: a file, or a diffusers folder."""
    no_half_vae: bool = False
    """Encode images in float32 whatever `training.mixed_precision` is; for a VAE that half precision harms."""
    clip_skip: int = field(default=1, validator=v.ge(1))
    """Which layer of the text encoder is read, counted from the last, which is 1."""
    max_token_length: Literal[75, 150, 225] = 75
    """Longest caption in tokens; what is longer is cut off."""
    base_weights: tuple[Path, ...] = ()
    """LoRA files that are merged into the model before training, in this order."""
    base_weights_multipliers: tuple[float, ...] = ()
    """How strongly each of `base_weights` is merged; 1 for those without a number here."""

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the files, as far as it shows without reading weights; keys are field names."""
        yield from self._problems_of_base_weights()
        try:
            stored = self.stored()
            stored.check()
        except ModelError as error:
            yield Problem("path", str(error))
            return
        traits = None if isinstance(stored.location, HubModel) else traits_of(stored.summary)
        if traits is not None and traits.version != self.version:
            message = f"{stored.location} is {describe(stored.summary)}, not a Stable Diffusion {self.version} model"
            yield Problem("path", message, "leave model.family out, and it is recognised")

    def build(self, device: torch.device, dtype: torch.dtype) -> DiffusionModel:
        """The model, its weights not read yet: each part is read when it is first asked for."""
        from lorakit.models.merging import MergedFile, Merging
        from lorakit.models.stable_diffusion.model import StableDiffusion

        stored = self.stored()
        stated = stored.scheduler_settings().get("prediction_type")
        prediction = self.prediction or ("v_prediction" if stated == "v_prediction" else "epsilon")
        multipliers = chain(self.base_weights_multipliers, repeat(1.0))
        merging = Merging([MergedFile(path, next(multipliers)) for path in self.base_weights])
        variant = evolve(self.variant(prediction), no_half_vae=self.no_half_vae)
        return StableDiffusion(stored, variant, device, dtype, merging=merging)

    def warnings_with(self, config: TrainConfig) -> Iterator[Problem]:
        """A VAE in full precision in a run that has no other."""
        if self.no_half_vae and config.training.mixed_precision == "no":
            yield Problem("no_half_vae", "has no effect without training.mixed_precision")

    def variant(self, prediction: Prediction) -> Variant:
        """How this family's models are run, and what LoRA files call them."""
        raise NotImplementedError(f"{type(self).__name__} does not say its variant")

    def stored(self) -> StoredModel:
        """Where the model's parts are; a `ModelError` if the path leads nowhere."""
        return StoredModel(locate(self.path, Path()), self.vae)

    def _problems_of_base_weights(self) -> Iterator[Problem]:
        for index, path in enumerate(self.base_weights):
            try:
                summary = summarize(path)
                lora_names(summary)
            except (ModelError, AdapterError) as error:
                yield Problem(f"base_weights[{index}]", str(error).removesuffix("."))
                continue
            kind, ours = adapter_kind(summary), f"Stable Diffusion {self.version}"
            if kind.algorithm not in {"LoRA", "DoRA"}:
                found = f"{path} is {kind.description}, which cannot be merged"
                yield Problem(f"base_weights[{index}]", found, "give LoRA files")
            elif kind.model not in {"", ours}:
                found = f"{path} is {kind.description}, and the base model is {ours}"
                yield Problem(f"base_weights[{index}]", found, "give LoRA files for the same kind of base model")
        if len(self.base_weights_multipliers) > len(self.base_weights):
            yield Problem("base_weights_multipliers", "has more numbers than base_weights has files")
