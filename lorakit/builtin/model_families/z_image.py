"""Z-Image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.api.hookspecs import hookimpl
from lorakit.api.model_family import DetectedFamily, ModelFamilyConfig
from lorakit.api.noise import FlowSpec, ShiftLine
from lorakit.checkpoints import CheckpointSummary, is_add_on
from lorakit.models.families.flow.checkpoint import TRANSFORMER_PREFIXES
from lorakit.models.families.flow.config import FlowTransformerConfig
from lorakit.models.families.flow.qwen3 import QWEN3
from lorakit.models.families.z_image.checkpoint import ZImageCheckpoint
from lorakit.models.families.z_image.parts import LAYOUT, TRANSFORMER

if TYPE_CHECKING:
    from lorakit.models.families.z_image.model import ZImage

_PIPELINE, _CLASS = "ZImagePipeline", "ZImageTransformer2DModel"
_MARK = "cap_pad_token"


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
    preview_steps = 30
    preview_scale = 4.0
    usual_parts = {  # noqa: RUF012 - a ClassVar of the base
        "text_encoder": 'a file such as "qwen_3_4b.safetensors", a folder, or a Hub id such as "Qwen/Qwen3-4B"',
        "vae": 'a file such as "ae.safetensors", or a folder',
        "tokenizer": 'the folder tokenizer of a Z-Image in diffusers\' layout, or a Hub id such as "Qwen/Qwen3-4B"',
    }

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
