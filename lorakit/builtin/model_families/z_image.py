"""Z-Image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from lorakit.api.hookspecs import hookimpl
from lorakit.api.model_family import DetectedFamily, ModelFamilyConfig
from lorakit.api.noise import FlowSpec, ShiftLine
from lorakit.checkpoints import CheckpointSummary, is_add_on
from lorakit.errors import ModelError, Problem
from lorakit.models.families.flow.checkpoint import TRANSFORMER_PREFIXES
from lorakit.models.families.flow.config import FlowTransformerConfig, TokenCounter
from lorakit.models.families.flow.qwen3 import QWEN3, qwen3_lengths
from lorakit.models.families.z_image.checkpoint import ZImageCheckpoint
from lorakit.models.families.z_image.parts import LAYOUT, TEMPLATE, TRANSFORMER

if TYPE_CHECKING:
    from lorakit.models.families.z_image.model import ZImage

_PIPELINE, _CLASS = "ZImagePipeline", "ZImageTransformer2DModel"
_MARK = "cap_pad_token"
_TURBO = re.compile(r"(?<!de-)(?<!de_)(?<!de)turbo", re.IGNORECASE)
"""Matches the names of distilled models, but not of those whose distillation was undone."""
_TURBO_SHIFT = 3.0
"""The scheduler's shift in folders of Z-Image-Turbo; that of Z-Image is 6."""


@frozen(kw_only=True)
class ZImageConfig(FlowTransformerConfig):
    """Z-Image and Z-Image-Turbo (Tongyi Lab, 2025, arXiv:2511.22699)."""

    name = "z_image"
    title = adapter_title = "Z-Image"
    parts = (TRANSFORMER, QWEN3)
    layout = LAYOUT
    lora_layout = "original"
    layer_tags = ("transformer", "attention", "mlp", "modulation", "refiner", "text_encoder")
    checkpoint_type = ZImageCheckpoint
    flow = FlowSpec(shift=ShiftLine(), preview_shift=6.0)
    usual_parts = {  # noqa: RUF012 - a ClassVar of the base
        "text_encoder": 'a file such as "qwen_3_4b.safetensors", a folder, or a Hub id such as "Qwen/Qwen3-4B"',
        "vae": 'a file such as "ae.safetensors", or a folder',
        "tokenizer": 'the folder tokenizer of a Z-Image in diffusers\' layout, or a Hub id such as "Qwen/Qwen3-4B"',
    }

    distilled: bool | None = None
    """Whether the model draws in few steps without guidance, as Z-Image-Turbo does; by its scheduler or its name when
    absent. Previews then take 8 steps."""

    @property
    def preview_steps(self) -> int:  # type: ignore[override]
        """8 for Turbo, 30 for Z-Image."""
        return 8 if self.is_distilled else 30

    @property
    def preview_scale(self) -> float:  # type: ignore[override]
        """None for Turbo."""
        return 1.0 if self.is_distilled else 4.0

    @property
    def noise_process(self) -> FlowSpec:
        """Flow matching; previews of Turbo have another shift."""
        return evolve(self.flow, preview_shift=3.0) if self.is_distilled else self.flow

    @property
    def is_distilled(self) -> bool:
        """What the config says, or the folder's scheduler or the name."""
        if self.distilled is not None:
            return self.distilled
        try:
            configs = self.stored.summary.configs
        except ModelError:
            configs = {}
        shift = configs.get("scheduler", {}).get("shift")
        return shift == _TURBO_SHIFT if shift else _TURBO.search(Path(self.path).name) is not None

    def token_counters(self) -> Iterator[TokenCounter]:
        """Qwen3's tokenizer."""
        yield partial(qwen3_lengths, self.tokenizer_on_disk("tokenizer"), TEMPLATE)

    def warnings(self) -> Iterator[Problem]:
        """A distilled model that is trained without an adapter for that."""
        yield from super().warnings()
        if self.is_distilled and self.training_adapter is None:
            message = f"{self.path} is distilled to few steps, which training destroys: pictures become soft"
            hint = (
                "train Z-Image itself, or set model.training_adapter to a LoRA that undoes the distillation, such as "
                "ostris/zimage_turbo_training_adapter; model.distilled = false if it is not distilled"
            )
            yield Problem("path", message, hint)

    def model_type(self) -> type[ZImage]:
        """The class of the model."""
        from lorakit.models.families.z_image.model import ZImage

        return ZImage


@hookimpl
def register_model_families() -> list[type[ModelFamilyConfig]]:
    """Z-Image."""
    return [ZImageConfig]


@hookimpl
def detect_model_family(checkpoint: CheckpointSummary) -> DetectedFamily | None:
    """`z_image` for the pipeline of diffusers, or a transformer with refiners and a token that fills captions up."""
    configs = checkpoint.configs
    classes = [configs.get(name, {}).get("_class_name") for name in ("model_index", "transformer", "config")]
    names = {f"{prefix}{_MARK}" for prefix in TRANSFORMER_PREFIXES}
    if {_PIPELINE, _CLASS} & {*classes} or (names & checkpoint.tensors.keys() and not is_add_on(checkpoint)):
        return DetectedFamily(ZImageConfig.name, "a Z-Image model")
    return None
