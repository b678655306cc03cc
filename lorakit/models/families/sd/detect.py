"""Which version of Stable Diffusion a checkpoint is, from tensor names and shapes or from a folder's configs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from attrs import frozen

from lorakit.api.model_family import DetectedFamily
from lorakit.checkpoints import CheckpointSummary, Shapes, kind_of

_CONTEXT_KEY = "transformer_blocks.0.attn2.to_k.weight"
_UNET = "model.diffusion_model."
_TEXT_ENCODER = re.compile(r"(?:cond_stage_model|conditioner\.embedders\.([^.]*))\.(transformer|model)\.")
_MORE_INPUTS = ("label_emb.0.0.weight", "label_emb.weight", "time_embed.cond_proj.weight")
_REFINER_CONTEXT = 1280
_PLAYGROUND = "a Playground 2.5 model, which has another noise process (EDM) than Stable Diffusion XL"
_COSXL = "a CosXL model, which has another noise process (EDM) than Stable Diffusion XL"
_KOALA = "a KOALA model, which lacks blocks of Stable Diffusion XL"
_OF_XL = "train on Stable Diffusion XL itself, or a model of its structure"
_PLAIN = "train on the plain model that it was made from; the LoRA works with the {} model, too"
_UNUSUAL_UNET = ("addition_embed_type", "class_embed_type", "encoder_hid_dim", "time_cond_proj_dim", "num_class_embeds")


@frozen
class Traits:
    """What tells the latent diffusion models with a U-Net apart."""

    text_encoders: tuple[str, ...]
    """`clip` and `open_clip` by the library whose layout each text encoder has; folders know only `clip`."""
    in_channels: int
    """Channels of the U-Net's input: 4 latent channels, 9 for inpainting, 8 for editing after instructions."""
    context_dim: int
    """Width of the text encoder's output as the U-Net's cross-attention takes it."""
    linear_projection: bool
    """Whether the U-Net's transformers start with a linear layer (SD 2.x, SDXL) or a 1×1 convolution (SD 1.x)."""
    conditioned: bool
    """Whether the U-Net takes more than timestep and text, such as the image size (SDXL)."""
    is_xl: bool = False
    """Whether the text encoders have the places, or the U-Net the input, that only SDXL has."""
    variety: str = ""
    """What sets it apart: `unCLIP` or `LCM` for what the U-Net takes besides noise, timestep, text and size; of SDXL
    what it is, in words, where blocks are left out or the noise process is another; empty for the usual."""

    @property
    def version(self) -> Literal["1.x", "2.x", "XL"]:
        """The version of Stable Diffusion."""
        if self.is_xl or len(self.text_encoders) > 1:
            return "XL"
        return "2.x" if self.linear_projection or self.text_encoders == ("open_clip",) else "1.x"


def traits_of(summary: CheckpointSummary) -> Traits | None:
    """The traits of a model with a U-Net and a text encoder, or None if it is something else."""
    return _folder_traits(summary.configs) if summary.kind == "folder" else _file_traits(summary.tensors)


def _file_traits(tensors: Shapes) -> Traits | None:
    context = next((shape for name, shape in tensors.items() if name.startswith(_UNET) and _CONTEXT_KEY in name), ())
    entry = tensors.get(f"{_UNET}input_blocks.0.0.weight", ())
    projection = next((tensors[name] for name in tensors if name.startswith(_UNET) and ".proj_in.weight" in name), ())
    if len(context) != 2 or len(entry) != 4 or not projection:
        return None
    # Number and library of each text encoder; there is one without a number, or some with (SDXL).
    found = filter(None, map(_TEXT_ENCODER.match, tensors))
    encoders = {(match[1] or "0", "open_clip" if match[2] == "model" else "clip") for match in found}
    is_xl = any(name.startswith("conditioner.embedders.") for name in tensors)
    sees_images = f"{_UNET}label_emb.0.0.weight" in tensors and not is_xl
    sees_images = sees_images or any(name.startswith("embedder.model.visual.") for name in tensors)
    is_lcm = f"{_UNET}time_embed.cond_proj.weight" in tensors
    variety = "LCM" if is_lcm else "unCLIP" if sees_images else _xl_variety(tensors) if is_xl else ""
    return Traits(
        text_encoders=tuple(kind for _, kind in sorted(encoders)),
        in_channels=entry[1],
        context_dim=context[1],
        linear_projection=len(projection) == 2,
        conditioned=any(f"{_UNET}{name}" in tensors for name in _MORE_INPUTS),
        is_xl=is_xl,
        variety=variety,
    )


def _xl_variety(tensors: Shapes) -> str:
    """What a file with SDXL's text encoders is, where it is not SDXL itself; else nothing."""
    if "edm_mean" in tensors and "edm_std" in tensors:
        return _PLAYGROUND
    if any(name.startswith("edm_vpred.") for name in tensors):
        return _COSXL

    if f"{_UNET}input_blocks.2.0.op.weight" in tensors:
        return _KOALA

    def depth(place: str) -> int:
        names = (f"{_UNET}{place}.1.transformer_blocks.{index}.norm1.weight" for index in range(10))
        return sum(name in tensors for name in names)

    return _pruned(depth("input_blocks.4"), depth("input_blocks.7"))


def _pruned(upper: int, lower: int) -> str:
    """The name of a U-Net by the depth of the first transformer at its lower two levels; empty for SDXL and others."""
    return {(2, 4): "an SSD-1B model", (1, 2): "a Segmind-Vega model"}.get((upper, lower), "")


def _folder_traits(configs: Mapping[str, Mapping[str, Any]]) -> Traits | None:
    unet, index = configs.get("unet"), configs.get("model_index", {})
    if unet is None or unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        return None
    context_dim, in_channels = unet.get("cross_attention_dim"), unet.get("in_channels", 4)
    if not isinstance(context_dim, int) or not isinstance(in_channels, int):
        return None
    parts = configs.keys() | {
        part for part, implementation in index.items() if implementation not in (None, [None, None])
    }
    is_xl = unet.get("addition_embed_type") == "text_time"
    variety = "LCM" if unet.get("time_cond_proj_dim") else "unCLIP" if unet.get("class_embed_type") else ""
    return Traits(
        text_encoders=("clip",) * sum(part.startswith("text_encoder") for part in parts),
        in_channels=in_channels,
        context_dim=context_dim,
        linear_projection=bool(unet.get("use_linear_projection")),
        conditioned=any(unet.get(option) is not None for option in _UNUSUAL_UNET),
        is_xl=is_xl,
        variety=variety or (_xl_folder_variety(unet, configs.get("scheduler", {})) if is_xl else ""),
    )


def _xl_folder_variety(unet: Mapping[str, Any], scheduler: Mapping[str, Any]) -> str:
    """What a folder with SDXL's U-Net is, where it is not SDXL itself; else nothing."""
    if str(scheduler.get("_class_name")).startswith("EDM"):
        return _COSXL if scheduler.get("prediction_type") == "v_prediction" else _PLAYGROUND
    if unet.get("layers_per_block") == 1:
        return _KOALA
    depths = unet.get("transformer_layers_per_block")
    # Those of the first transformer where each at a level has another depth.
    first = [own[0] if isinstance(own, list) and own else own for own in depths] if isinstance(depths, list) else []
    return _pruned(*first[1:]) if len(first) == 3 else ""


def detect(summary: CheckpointSummary) -> DetectedFamily | None:
    """What a checkpoint is called if it is any Stable Diffusion with a U-Net and a text encoder, else None.

    Named are the families `sd1` and `sd2`; variants with other inputs, and SDXL, have a title only.
    """
    traits = traits_of(summary)
    if traits is None or not traits.text_encoders:
        return None
    if traits.version == "XL" and traits.context_dim == _REFINER_CONTEXT:
        return DetectedFamily(None, "the refiner of Stable Diffusion XL")
    purpose = {4: "", 5: "depth-to-image", 7: "upscaling", 8: "image-editing", 9: "inpainting"}.get(
        traits.in_channels, "special"
    )
    # SDXL is conditioned on the image's size, all others on something special.
    if not purpose and traits.version == "XL" and traits.variety not in ("LCM", "unCLIP"):
        return _xl(traits)
    purpose = purpose or traits.variety or ("special" if traits.conditioned else "")
    if purpose:
        cure = "" if purpose in {"upscaling", "special"} else _PLAIN.format(purpose)
        return DetectedFamily(None, f"a Stable Diffusion {traits.version} {purpose} model", cure)
    library = "open_clip" if traits.version == "2.x" and summary.kind != "folder" else "clip"
    is_known = traits.text_encoders == (library,) and traits.linear_projection == (traits.version == "2.x")
    name = {"1.x": "sd1", "2.x": "sd2"}.get(traits.version) if is_known else None
    return DetectedFamily(name, f"a Stable Diffusion {traits.version} model")


def _xl(traits: Traits) -> DetectedFamily:
    """Stable Diffusion XL, or what was made from it by leaving blocks out or with another noise process."""
    if traits.variety:
        return DetectedFamily(None, traits.variety, _OF_XL)
    return DetectedFamily("sdxl" if len(traits.text_encoders) == 2 else None, "a Stable Diffusion XL model")


def recognise(summary: CheckpointSummary) -> DetectedFamily:
    """What any checkpoint is called: a version of Stable Diffusion, or a file of another kind."""
    return detect(summary) or kind_of(summary)
