"""Lumina 2 as a plugin: what can be known before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.api import (
    BlockLayout,
    CheckpointSummary,
    DetectedFamily,
    FlowSpec,
    ModelFamilyConfig,
    ModelPart,
    hookimpl,
    locate,
)

if TYPE_CHECKING:
    import torch

    from lorakit.api import NoiseSpec
    from tests.flow_family.model import Lumina

FLOW = FlowSpec(shift=2.0, preview_shift=6.0, timestep_scale=1.0)
TRANSFORMER = ModelPart("transformer", title="transformer", lora_prefix="lora_unet_")
GEMMA = ModelPart("text_encoder", title="Gemma", encoders=(0,), lora_prefix="lora_te_")
LAYOUT = BlockLayout(2, {"layers": range(2)})


@frozen(kw_only=True)
class LuminaConfig(ModelFamilyConfig):
    """Lumina 2."""

    name = "lumina2"
    title = "Lumina 2"
    parts = (TRANSFORMER, GEMMA)
    default_parts = ("transformer",)
    layout = LAYOUT
    lora_layout = "original"
    lora_layouts = ("kohya", "original", "diffusers")
    layer_tags = ("transformer", "attention", "mlp", "text_encoder")
    size_multiple = 16
    preview_size = 1024
    supports_weighted_captions = False

    base_weights: tuple[Path, ...] = ()
    """LoRA files to merge into the model."""

    @property
    def noise_process(self) -> NoiseSpec:
        """Flow matching."""
        return FLOW

    def build(self, device: torch.device, dtype: torch.dtype) -> Lumina:
        """The model; each part's weights are loaded on first use."""
        from lorakit.api import FlowMatching, MergedFile, Merging
        from tests.flow_family.model import Lumina, LuminaCheckpoint

        merging = Merging([MergedFile(path) for path in self.base_weights])
        return Lumina(LuminaCheckpoint(locate(self.path, Path())), FlowMatching(FLOW), device, dtype, merging)


@hookimpl
def register_model_families() -> list[type[ModelFamilyConfig]]:
    """Lumina 2."""
    return [LuminaConfig]


@hookimpl
def detect_model_family(checkpoint: CheckpointSummary) -> DetectedFamily | None:
    """A folder of Lumina 2's pipeline."""
    if checkpoint.configs.get("model_index", {}).get("_class_name") == "Lumina2Pipeline":
        return DetectedFamily("lumina2", "a Lumina 2 model")
    return None
