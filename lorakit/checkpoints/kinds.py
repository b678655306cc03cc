"""What a file or folder is that is no base model of any family: by the tensors of a file, or the configs of a folder.

Of adapters also their algorithm, and the kind of model that they are for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attrs import frozen

from lorakit.api.model_family import DetectedFamily
from lorakit.checkpoints.lora_models import OTHER, alternatives, model_of_adapters
from lorakit.checkpoints.summary import CheckpointSummary, Shapes


def _kind(title: str, advice: str = "") -> DetectedFamily:
    return DetectedFamily(None, title, advice)


_LORA = "model.path is the base model; network.weights takes a LoRA to continue from, model.base_weights one to merge"
_OWN_KEY = "give it as model.vae, and in model.path the model that it belongs to"
_WHOLE = "model.path takes a whole model: U-Net, text encoder and VAE"
_CONTROL = "train on the plain model; the LoRA works together with it"
_NO_BASE = ", not a base model"
_WHOLE_MODEL = _kind("a base model")
_UNKNOWN = _kind("a file of an unknown kind of model")
_EMBEDDING = _kind("a textual-inversion embedding, not a base model", "model.path is the base model it was trained on")
_VAE = _kind("a VAE alone", _OWN_KEY)
_TINY_VAE = _kind("a tiny VAE for previews (TAESD)", "model.vae takes a full VAE, an AutoencoderKL")
_TEXT_ENCODER = _kind("a text encoder alone", _WHOLE)
_OF_TRANSFORMERS = (
    "give it as model.text_encoder or model.text_encoder_2, and in model.path the transformer that reads it"
)
_T5 = _kind("a text encoder (T5) alone", _OF_TRANSFORMERS)
_QWEN3 = _kind("a text encoder (Qwen3) alone", _OF_TRANSFORMERS)
_QWEN_IMAGE_VAE = _kind("a VAE alone, that of Qwen-Image and Anima", _OWN_KEY)
_UNET = _kind("a U-Net without a text encoder", _WHOLE)
_CONTROLNET = _kind("a ControlNet, not a base model", _CONTROL)
_ADAPTER = _kind("a T2I-Adapter, not a base model", _CONTROL)
_MOTION = _kind("a motion module of AnimateDiff, not a base model", _CONTROL)


_Kinds = tuple[tuple[DetectedFamily, tuple[str, ...]], ...]
"""Kinds of files, and fragments of the names of their tensors; a file is of the first kind that matches."""

_WITH_ADAPTERS: _Kinds = (
    (_CONTROLNET, ("control_model.", "controlnet_cond_embedding.", "controlnet_down_blocks.", "input_hint_block.",
                   "lora_controlnet")),
    (_kind("an IP-Adapter, not a base model", _CONTROL), ("ip_adapter.", "image_proj.", ".to_k_ip.")),
)  # fmt: skip
"""Add-ons to a base model, some of which have adapters in them."""
_ADD_ONS: _Kinds = (
    (_kind("a LoRA of an unknown kind, not a base model", _LORA), ("lora_unet_", "lora_te_", "lora_te1_", "lycoris_")),
    (_MOTION, ("motion_modules.", "temporal_transformer.")),
)
"""Other add-ons to a base model."""
_OTHERS: _Kinds = (
    (_kind("a safety checker, not a base model"), ("concept_embeds", "special_care_embeds")),
    (_kind("an image upscaler, not a base model"), ("RDB1.conv1.", "rdb1.conv1.", ".residual_group.", "upsampler.0.",
                                                  "params_ema.")),
    (_ADAPTER, ("adapter.body.", "body.0.block1.", "body.0.in_conv.", "body.0.resnets.0.")),
    (_kind("a file with nothing but EMA copies of the U-Net's weights", "take the file that has the plain weights"),
     ("model_ema.diffusion_model",)),
    (_UNET, ("input_blocks.0.0.weight", "down_blocks.0.attentions.0.proj_in.weight")),
    (_kind("half a model: its U-Net lacks the first layer, input_blocks.0.0.weight", "download or convert it again"),
     ("model.diffusion_model.",)),
    (_VAE, ("encoder.down.0.block.0.", "encoder.down_blocks.0.resnets.0.", "first_stage_model.")),
    (_kind("an image encoder of CLIP"), ("vision_model.", "visual.transformer.resblocks.")),
    (_T5, ("encoder.block.0.layer.0.SelfAttention.",)),
    (_QWEN3, ("layers.0.self_attn.q_norm.",)),
    (_QWEN_IMAGE_VAE, ("decoder.middle.0.residual.0.gamma",)),
    (_TEXT_ENCODER, ("encoder.layers.0.self_attn.", "transformer.resblocks.0.", "cond_stage_model.")),
    (_EMBEDDING, ("string_to_param", "emb_params")),
)  # fmt: skip
_TEXT_ENCODERS = ("cond_stage_model.", "conditioner.embedders.")
"""What text encoders' tensors begin with in single files of whole models."""
_HYPERNETWORK = _kind("a hypernetwork, not a base model", "model.path is the base model it was trained on")
_CLASSES: Mapping[str, DetectedFamily] = {
    "AutoencoderKL": _VAE,
    "AutoencoderTiny": _TINY_VAE,
    "UNet2DConditionModel": _UNET,
    "ControlNetModel": _CONTROLNET,
    "T2IAdapter": _ADAPTER,
    "MotionAdapter": _MOTION,
    "CLIPTextModel": _TEXT_ENCODER,
    "CLIPTextModelWithProjection": _TEXT_ENCODER,
    "T5EncoderModel": _T5,
    "Qwen3Model": _QWEN3,
    "Qwen3ForCausalLM": _QWEN3,
    "AutoencoderKLQwenImage": _QWEN_IMAGE_VAE,
    "CLIPVisionModelWithProjection": _kind("an image encoder of CLIP"),
    "StableDiffusionSafetyChecker": _kind("a safety checker, not a base model"),
}
_TINY_VAE_BLOCK = re.compile(r"(?:.*coder\.)?(?:layers\.)?[1-5]\.conv\.0\.weight")
"""Matches the first convolution of a block, in the layouts of diffusers, of TAESD's own files and of ComfyUI."""
_EMBEDDING_WIDTHS = (768, 1024, 1280)
_HYPERNETWORK_WIDTHS = ("320", "640", "768", "1024", "1280")


def kind_of(summary: CheckpointSummary) -> DetectedFamily:
    """What a checkpoint is that no family recognises."""
    return _kind_of_config(summary.configs) if summary.kind == "folder" else _kind_of_tensors(summary.tensors)


def describe(summary: CheckpointSummary) -> str:
    """The same in words that fit behind "is", where no base model is wanted: `a VAE alone`, `a LoRA file`."""
    return kind_of(summary).title.removesuffix(_NO_BASE)


def is_other_part(summary: CheckpointSummary, title: str) -> bool:
    """Whether a file is known to be something else than a whole model or the part with this title: `VAE`.

    Behind a title may be of which kind the part is, `text encoder (T5)`, which is not known of all.
    """
    kind = kind_of(summary)
    of_its_kind = kind.title.startswith(f"a {title} ") or kind.title == f"a {title.partition(' (')[0]} alone"
    return kind not in (_WHOLE_MODEL, _UNKNOWN) and not of_its_kind


def is_add_on(summary: CheckpointSummary) -> bool:
    """Whether a file is a LoRA, a ControlNet or the like, which is used together with a base model."""
    return _add_on(summary.tensors) is not None


def _add_on(tensors: Shapes) -> DetectedFamily | None:
    """Which add-on to a base model a file with these tensors is; None if it is none."""
    if found := _first(_WITH_ADAPTERS, tensors):
        return found
    if algorithm := _algorithm(tensors):
        return _kind(f"{_with_article(algorithm)}, not a base model", _LORA)
    return _first(_ADD_ONS, tensors)


def _first(kinds: _Kinds, tensors: Shapes) -> DetectedFamily | None:
    """The first of these kinds that tensors have the names of."""
    return next((kind for kind, marks in kinds if any(mark in name for name in tensors for mark in marks)), None)


def _kind_of_tensors(tensors: Shapes) -> DetectedFamily:
    """What a file with these tensors is."""
    if not tensors:
        return _kind("a file without tensors")
    if found := _add_on(tensors) or _first(_OTHERS, tensors):
        is_whole = found is _UNET and any(name.startswith(_TEXT_ENCODERS) for name in tensors)
        return _WHOLE_MODEL if is_whole else found
    # Vectors as wide as a text encoder's tokens.
    if len(tensors) <= 4 and all(len(shape) in {1, 2} and shape[-1] in _EMBEDDING_WIDTHS for shape in tensors.values()):
        return _EMBEDDING
    if any(map(_TINY_VAE_BLOCK.fullmatch, tensors)):
        return _TINY_VAE
    if all(name.partition(".")[0] in _HYPERNETWORK_WIDTHS for name in tensors):
        return _HYPERNETWORK
    return _UNKNOWN


def _kind_of_config(configs: Mapping[str, Mapping[str, Any]]) -> DetectedFamily:
    """What a folder with these configs is."""
    pipeline = configs.get("model_index", {}).get("_class_name")
    if pipeline:
        return _kind(f"a model for diffusers' {pipeline!s:.80}")
    alone = configs.get("config", {})
    architectures = alone.get("architectures")
    names = [alone.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
    found = next((name for name in names if isinstance(name, str)), None)
    if found is None:
        return _kind("a diffusers folder without a whole model")
    return _CLASSES.get(found, _kind(f"one part of a model, of the class {found:.80}"))


_ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    "LoHa with Tucker decomposition": ("hada_t1", "hada_t2"),
    "LoKr with Tucker decomposition": ("lokr_t2",),
    "LoHa": ("hada_w1_a", "hada_w1_b"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"),
    "OFT": ("oft_blocks", "oft_diag", "oft_r", "oft_R"),
    "BOFT": ("boft_R", "boft_s"),
    "IA3": ("on_input", "ia3_l"),
    "GLoRA": ("a1", "b1"),
    "VeRA": ("vera_lambda_b", "vera_lambda_d"),
    "LoCon with Tucker decomposition": ("lora_mid",),
    "full difference": ("diff", "diff_b", "set_weight"),
    "LoRA with trained norms": ("w_norm", "b_norm"),
    "LoRA with embeddings": ("string_to_param", "lora_embedding_A"),
    "DoRA": ("dora_scale", "lora_magnitude_vector"),
    "LoRA": ("lora_up", "lora_down", "lora_A", "lora_B", "lora", "lora_linear_layer"),
}
"""Kinds of adapters, and the steps that the names of their tensors have behind a layer's name."""
TRAINED_BY: Mapping[str, str] = {
    "LoRA": 'name = "lierla" or "c3lier"',
    "DoRA": 'name = "lierla" or "c3lier", and dora = true',
    "LoHa": 'name = "loha"',
    "LoKr": 'name = "lokr"',
}
"""Kinds of adapters that can be trained, and the keys of [network] that do it."""
MERGED = (*TRAINED_BY, "LoHa with Tucker decomposition", "LoKr with Tucker decomposition")
"""Kinds of adapters that can be merged into a base model."""
OF_LYCORIS: Mapping[str, str] = {
    "OFT": 'algo = "diag-oft"',
    "BOFT": 'algo = "boft"',
    "IA3": 'algo = "ia3"',
    "GLoRA": 'algo = "glora"',
    "LoHa with Tucker decomposition": 'algo = "loha", use_tucker = true',
    "LoKr with Tucker decomposition": 'algo = "lokr", use_tucker = true',
    "LoCon with Tucker decomposition": 'algo = "locon", use_tucker = true',
}
"""Other algorithms of LyCORIS, and the arguments that choose them."""


@frozen
class AdapterKind:
    """What a file holds."""

    algorithm: str
    """`LoRA`, `DoRA`, `LoHa`, …; empty where it holds no adapters."""
    model: str
    """`Stable Diffusion XL`, `FLUX.1 or Chroma`, …; empty where the names do not show it."""
    description: str
    """In words that fit behind "is": `a LoHa for Stable Diffusion XL`, `a Stable Diffusion 1.x model`."""

    def fits(self, title: str) -> bool:
        """Whether the adapters may be for the models with a title; an empty one is not checked."""
        if self.model == OTHER:
            return not title.startswith("Stable Diffusion")
        return not title or not self.model or title in alternatives(self.model)


def adapter_kind(summary: CheckpointSummary) -> AdapterKind:
    """What kind of adapters a file holds; `summary` has the tensors by their names in the file."""
    tensors = summary.tensors
    algorithm = _algorithm(tensors)
    if not algorithm:
        return AdapterKind("", "", describe(summary))
    model = model_of_adapters(summary)
    return AdapterKind(algorithm, model, _with_article(algorithm) + (f" for {model}" if model else ""))


def _with_article(algorithm: str) -> str:
    return f"{'an' if algorithm[0] in 'OI' else 'a'} {algorithm}"


def _algorithm(tensors: Shapes) -> str:
    if any(re.fullmatch(r"(?:unet|text_encoder):\d+:(?:up|down)", name) for name in tensors):
        return "LoRA in the layout of lora-diffusion"
    if any(name.endswith(".dora_scale") and shape[:1] == (1,) != shape[1:2] for name, shape in tensors.items()):
        return "DoRA with a magnitude for each input"
    steps = {step for name in tensors for step in name.replace("_lora.", ".lora.").split(".")[1:]}
    return next((algorithm for algorithm, marks in _ALGORITHMS.items() if steps & set(marks)), "")
