"""Names for what is no whole model with a U-Net: by the tensors of a file, or by the configs of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from lorakit.checkpoints.summary import Shapes


@frozen
class Kind:
    """What a checkpoint is, and what to do with it."""

    words: str
    """What it is, as the end of a sentence: `a VAE alone`."""
    advice: str = ""
    """Which key takes it, or what to give in its place; empty where nothing helps."""


_LORA = "model.path is the base model; network.weights takes a LoRA to continue from, model.base_weights one to merge"
_OWN_KEY = "give it as model.vae, and in model.path the model that it belongs to"
_WHOLE = "model.path takes a whole model: U-Net, text encoder and VAE"
_CONTROL = "train on the plain model; the LoRA works together with it"
_EMBEDDING = Kind("a textual-inversion embedding, not a base model", "model.path is the base model it was trained on")
_VAE = Kind("a VAE alone", _OWN_KEY)
_TEXT_ENCODER = Kind("a text encoder alone", _WHOLE)
_UNET = Kind("a U-Net without a text encoder", _WHOLE)
_CONTROLNET = Kind("a ControlNet, not a base model", _CONTROL)
_ADAPTER = Kind("a T2I-Adapter, not a base model", _CONTROL)
_MOTION = Kind("a motion module of AnimateDiff, not a base model", _CONTROL)


def _lora(name: str) -> Kind:
    return Kind(f"{name} file, not a base model", _LORA)


_MARKS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    # Those further up may also have the marks of those further down.
    (_CONTROLNET, ("control_model.", "controlnet_cond_embedding.", "controlnet_down_blocks.", "input_hint_block.",
                   "lora_controlnet")),
    (Kind("an IP-Adapter, not a base model", _CONTROL), ("ip_adapter.", "image_proj.", ".to_k_ip.")),
    (_lora("a LoHa"), (".hada_w1_a",)),
    (_lora("a LoKr"), (".lokr_w1", ".lokr_w2")),
    (_lora("an OFT"), (".oft_blocks", ".oft_diag", ".oft_R.")),
    (_lora("a GLoRA"), (".a1.weight", ".b1.weight")),
    (_lora("an (IA)³"), (".on_input", ".ia3_l")),
    (_lora("a DoRA"), (".dora_scale", ".lora_magnitude_vector")),
    (_lora("a LoRA"), (".lora_down.weight", ".lora_A.", ".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.",
                     "lora_unet_", "lora_te_", "lora_te1_", "lycoris_")),
    (_MOTION, ("motion_modules.", "temporal_transformer.")),
    (Kind("a Stable Diffusion 3 model"), ("joint_blocks.0.", "transformer_blocks.0.norm1_context.linear.weight")),
    (Kind("a Chroma model"), ("distilled_guidance_layer.",)),
    (Kind("a FLUX.2 model"), ("double_stream_modulation_img.",)),
    (Kind("a HunyuanVideo model"), ("individual_token_refiner.",)),
    (Kind("a FLUX model"), ("double_blocks.0.", "single_transformer_blocks.0.")),
    (Kind("a Qwen-Image model"), ("transformer_blocks.0.img_mod.1.",)),
    (Kind("an Anima model"), ("llm_adapter.",)),
    (Kind("a Krea 2 model"), ("txtfusion.", "text_fusion.")),
    (Kind("a Z-Image or Lumina model"), ("noise_refiner.0.",)),
    (Kind("an AuraFlow model"), ("double_layers.0.",)),
    (Kind("an LTX-Video model"), ("patchify_proj.",)),
    (Kind("a PixArt model"), ("y_embedder.y_embedding", "adaln_single.")),
    (Kind("a Stable Cascade model"), ("clip_txt_mapper.", "clip_txt_pooled_mapper.", "effnet_mapper.")),
    (Kind("a safety checker, not a base model"), ("concept_embeds", "special_care_embeds")),
    (Kind("an image upscaler, not a base model"), ("RDB1.conv1.", "rdb1.conv1.", ".residual_group.", "upsampler.0.",
                                                  "params_ema.")),
    (_ADAPTER, ("adapter.body.", "body.0.block1.", "body.0.in_conv.", "body.0.resnets.0.")),
    (Kind("a file with nothing but EMA copies of the U-Net's weights", "take the file that has the plain weights"),
     ("model_ema.diffusion_model",)),
    (_UNET, ("input_blocks.0.0.weight", "down_blocks.0.attentions.0.proj_in.weight")),
    (Kind("half a model: its U-Net lacks the first layer, input_blocks.0.0.weight", "download or convert it again"),
     ("model.diffusion_model.",)),
    (_VAE, ("encoder.down.0.block.0.", "encoder.down_blocks.0.resnets.0.", "first_stage_model.")),
    (Kind("an image encoder of CLIP"), ("vision_model.", "visual.transformer.resblocks.")),
    (Kind("a T5 text encoder"), ("encoder.block.0.layer.0.SelfAttention.",)),
    (_TEXT_ENCODER, ("encoder.layers.0.self_attn.", "transformer.resblocks.0.", "cond_stage_model.")),
    (_EMBEDDING, ("string_to_param", "emb_params")),
)  # fmt: skip
_HYPERNETWORK = Kind("a hypernetwork, not a base model", "model.path is the base model it was trained on")
_CLASSES: Mapping[str, Kind] = {
    "AutoencoderKL": _VAE,
    "AutoencoderTiny": Kind("a tiny VAE (TAESD) alone"),
    "UNet2DConditionModel": _UNET,
    "ControlNetModel": _CONTROLNET,
    "T2IAdapter": _ADAPTER,
    "MotionAdapter": _MOTION,
    "CLIPTextModel": _TEXT_ENCODER,
    "CLIPTextModelWithProjection": _TEXT_ENCODER,
    "T5EncoderModel": Kind("a T5 text encoder"),
    "CLIPVisionModelWithProjection": Kind("an image encoder of CLIP"),
    "StableDiffusionSafetyChecker": Kind("a safety checker, not a base model"),
    "FluxTransformer2DModel": Kind("a FLUX model"),
    "SD3Transformer2DModel": Kind("a Stable Diffusion 3 model"),
    "PixArtTransformer2DModel": Kind("a PixArt model"),
    "StableCascadeUNet": Kind("a Stable Cascade model"),
}
_EMBEDDING_WIDTHS = (768, 1024, 1280)
_HYPERNETWORK_WIDTHS = ("320", "640", "768", "1024", "1280")


def kind_of_tensors(tensors: Shapes) -> Kind:
    """What a file with these tensors is."""
    if not tensors:
        return Kind("a file without tensors")
    for kind, fragments in _MARKS:
        if any(fragment in name for name in tensors for fragment in fragments):
            return kind
    if len(tensors) <= 4 and all(_is_embedding(shape) for shape in tensors.values()):
        return _EMBEDDING
    if all(name.partition(".")[0] in _HYPERNETWORK_WIDTHS for name in tensors):
        return _HYPERNETWORK
    return Kind("a file of an unknown kind of model")


def kind_of_config(configs: Mapping[str, Mapping[str, Any]]) -> Kind:
    """What a folder with these configs is."""
    pipeline = configs.get("model_index", {}).get("_class_name")
    if pipeline:
        return Kind(f"a model for diffusers' {pipeline!s:.80}")
    alone = configs.get("config", {})
    architectures = alone.get("architectures")
    names = [alone.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
    found = next((name for name in names if isinstance(name, str)), None)
    if found is None:
        return Kind("a diffusers folder without a whole model")
    return _CLASSES.get(found, Kind(f"one part of a model, of the class {found:.80}"))


def _is_embedding(shape: tuple[int, ...]) -> bool:
    """Whether these are vectors as wide as a text encoder's tokens."""
    return len(shape) in {1, 2} and shape[-1] in _EMBEDDING_WIDTHS
