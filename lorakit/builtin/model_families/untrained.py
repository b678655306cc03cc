"""Names for base models that no family of lorakit trains; plugins that train them come first."""

from __future__ import annotations

from lorakit.api.hookspecs import hookimpl
from lorakit.api.model_family import DetectedFamily
from lorakit.checkpoints import CheckpointSummary, is_add_on
from lorakit.models.families.sd.detect import detect

_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # Those further up may also have the marks of those further down.
    ("a Stable Diffusion 3 model", ("joint_blocks.0.", "transformer_blocks.0.norm1_context.linear.weight")),
    ("a Chroma model", ("distilled_guidance_layer.",)),
    ("a FLUX.2 model", ("double_stream_modulation_img.",)),
    ("a HunyuanVideo model", ("individual_token_refiner.",)),
    ("a FLUX model", ("double_blocks.0.", "single_transformer_blocks.0.")),
    ("a Qwen-Image model", ("transformer_blocks.0.img_mod.1.",)),
    ("an Anima model", ("llm_adapter.",)),
    ("a Krea 2 model", ("txtfusion.", "text_fusion.")),
    ("a Z-Image or Lumina model", ("noise_refiner.0.",)),
    ("an AuraFlow model", ("double_layers.0.",)),
    ("an LTX-Video model", ("patchify_proj.",)),
    ("a PixArt model", ("y_embedder.y_embedding", "adaln_single.")),
    ("a Stable Cascade model", ("clip_txt_mapper.", "clip_txt_pooled_mapper.", "effnet_mapper.")),
)  # fmt: skip
"""What models are called, and fragments of the names of their tensors."""
_CLASSES = {
    "FluxTransformer2DModel": "a FLUX model",
    "SD3Transformer2DModel": "a Stable Diffusion 3 model",
    "PixArtTransformer2DModel": "a PixArt model",
    "StableCascadeUNet": "a Stable Cascade model",
}
"""What models are called of which a folder has the denoiser alone, by its class in diffusers."""


@hookimpl
def detect_model_family(checkpoint: CheckpointSummary) -> DetectedFamily | None:
    """The title of other versions of Stable Diffusion, and of other well-known models."""
    if found := detect(checkpoint):
        return DetectedFamily(None, found.title, found.advice)
    if checkpoint.kind == "folder":
        title = _CLASSES.get(str(checkpoint.configs.get("config", {}).get("_class_name")))
    elif is_add_on(checkpoint):
        return None
    else:
        names = checkpoint.tensors
        title = next((title for title, marks in _MARKS if any(mark in name for name in names for mark in marks)), None)
    return DetectedFamily(None, title) if title else None
