"""What checkpoints are said to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.checkpoints import CheckpointSummary
from lorakit.models.families.sd.detect import traits_of
from lorakit.plugins.catalog import Catalog

TEXT = "cond_stage_model.transformer."
UNET = "model.diffusion_model."
ATTENTION = f"{UNET}input_blocks.1.1."
CLIP = "text_model.encoder.layers.0.mlp.fc1.weight"
OPEN_CLIP = "transformer.resblocks.0.mlp.c_fc.weight"


def describe(summary: CheckpointSummary) -> str:
    """What messages call a checkpoint."""
    return Catalog.discover().detect_model_family(summary).title


def advice(summary: CheckpointSummary) -> str:
    """What messages advise to do with it."""
    return Catalog.discover().detect_model_family(summary).advice


def single_file(context: int, *others: str, channels: int = 4, linear: bool = False) -> CheckpointSummary:
    """A summary with the tensors that tell models apart, shaped as in the full-size models."""
    tensors: dict[str, tuple[int, ...]] = {
        f"{UNET}input_blocks.0.0.weight": (320, channels, 3, 3),
        f"{ATTENTION}proj_in.weight": (320, 320) if linear else (320, 320, 1, 1),
        f"{ATTENTION}transformer_blocks.0.attn2.to_k.weight": (320, context),
        **dict.fromkeys(others, (1, 1)),
    }
    return CheckpointSummary(Path("x.safetensors"), "safetensors", tensors)


def xl_file(*names: list[str], channels: int = 4) -> CheckpointSummary:
    """A summary of a single file with SDXL's text encoders and these tensors."""
    encoders = [f"conditioner.embedders.0.transformer.{CLIP}", f"conditioner.embedders.1.model.{OPEN_CLIP}"]
    others = [*encoders, f"{UNET}label_emb.0.0.weight", *(name for own in names for name in own)]
    return single_file(2048, *others, channels=channels, linear=True)


def transformers(block: int, depth: int) -> list[str]:
    """A tensor of each transformer block behind a ResNet block on the way down."""
    place = f"{UNET}input_blocks.{block}.1.transformer_blocks"
    return [f"{place}.{index}.norm1.weight" for index in range(depth)]


def tensors(*names: str) -> CheckpointSummary:
    """A summary of a file with tensors of these names."""
    return CheckpointSummary(Path("x.safetensors"), "safetensors", dict.fromkeys(names, (1, 1)))


def folder(index: dict[str, Any], **configs: Any) -> CheckpointSummary:
    """A summary of a folder with this `model_index.json` and these configs."""
    return CheckpointSummary(Path("x"), "folder", configs={"model_index": index, **configs})


SD1_UNET = {"in_channels": 4, "cross_attention_dim": 768}
SD2_UNET = {"in_channels": 4, "cross_attention_dim": 1024, "use_linear_projection": True}
SDXL_UNET = {"cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time"}
ONE_ENCODER = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
TWO_ENCODERS = {**ONE_ENCODER, "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}


@pytest.mark.parametrize(
    ("summary", "description"),
    [
        (single_file(768, TEXT + CLIP), "a Stable Diffusion 1.x model"),
        (single_file(768, f"{TEXT}encoder.layers.0.mlp.fc1.weight"), "a Stable Diffusion 1.x model"),
        (single_file(768, TEXT + CLIP, channels=9), "a Stable Diffusion 1.x inpainting model"),
        (single_file(1024, f"cond_stage_model.model.{OPEN_CLIP}", linear=True), "a Stable Diffusion 2.x model"),
        (
            single_file(
                2048,
                f"conditioner.embedders.0.transformer.{CLIP}",
                f"conditioner.embedders.1.model.{OPEN_CLIP}",
                f"{UNET}label_emb.0.0.weight",
                linear=True,
            ),
            "a Stable Diffusion XL model",
        ),
        (folder(ONE_ENCODER, unet=SD1_UNET), "a Stable Diffusion 1.x model"),
        (folder(ONE_ENCODER, unet=SD2_UNET), "a Stable Diffusion 2.x model"),
        (folder(TWO_ENCODERS, unet=SDXL_UNET), "a Stable Diffusion XL model"),
        (xl_file(transformers(4, 2), transformers(7, 10)), "a Stable Diffusion XL model"),
        (xl_file(transformers(4, 2), transformers(7, 4)), "an SSD-1B model"),
        (xl_file(transformers(4, 1), transformers(7, 2)), "a Segmind-Vega model"),
        (xl_file([f"{UNET}input_blocks.2.0.op.weight"]), "a KOALA model, which lacks blocks of Stable Diffusion XL"),
        (xl_file(["edm_mean", "edm_std"]), "a Playground 2.5 model, which has another noise process (EDM) than "
         "Stable Diffusion XL"),
        (xl_file(["edm_vpred.sigma_max", "edm_vpred.sigma_min"]), "a CosXL model, which has another noise process "
         "(EDM) than Stable Diffusion XL"),
        (xl_file([], channels=9), "a Stable Diffusion XL inpainting model"),
        (xl_file([], channels=8), "a Stable Diffusion XL image-editing model"),
        (folder(TWO_ENCODERS, unet={**SDXL_UNET, "transformer_layers_per_block": [1, 2, 10]}),
         "a Stable Diffusion XL model"),
        (folder(TWO_ENCODERS, unet={**SDXL_UNET, "transformer_layers_per_block": [0, [2, 2], [4, 4]]}),
         "an SSD-1B model"),
        (folder(TWO_ENCODERS, unet={**SDXL_UNET, "layers_per_block": 1}),
         "a KOALA model, which lacks blocks of Stable Diffusion XL"),
        (folder(TWO_ENCODERS, unet=SDXL_UNET, scheduler={"_class_name": "EDMDPMSolverMultistepScheduler"}),
         "a Playground 2.5 model, which has another noise process (EDM) than Stable Diffusion XL"),
        (folder(TWO_ENCODERS, unet=SDXL_UNET, scheduler={"_class_name": "EDMEulerScheduler",
                                                        "prediction_type": "v_prediction"}),
         "a CosXL model, which has another noise process (EDM) than Stable Diffusion XL"),
        (folder(TWO_ENCODERS, unet={**SDXL_UNET, "in_channels": 9}), "a Stable Diffusion XL inpainting model"),
        (folder({"text_encoder_2": ["transformers", "x"]}, unet={**SDXL_UNET, "cross_attention_dim": 1280}),
         "the refiner of Stable Diffusion XL"),
        (single_file(768, TEXT + CLIP, channels=8), "a Stable Diffusion 1.x image-editing model"),
        (single_file(1024, f"cond_stage_model.model.{OPEN_CLIP}", linear=True, channels=5),
         "a Stable Diffusion 2.x depth-to-image model"),
        (single_file(1024, f"cond_stage_model.model.{OPEN_CLIP}", f"{UNET}label_emb.weight", linear=True, channels=7),
         "a Stable Diffusion 2.x upscaling model"),
        (single_file(1024, f"cond_stage_model.model.{OPEN_CLIP}", f"{UNET}label_emb.0.0.weight",
                     "embedder.model.visual.conv1.weight", linear=True), "a Stable Diffusion 2.x unCLIP model"),
        (single_file(768, TEXT + CLIP, f"{UNET}time_embed.cond_proj.weight"), "a Stable Diffusion 1.x LCM model"),
        (single_file(1280, f"conditioner.embedders.0.model.{OPEN_CLIP}", f"{UNET}label_emb.0.0.weight", linear=True),
         "the refiner of Stable Diffusion XL"),
        (folder(ONE_ENCODER, unet={**SD1_UNET, "in_channels": 9}), "a Stable Diffusion 1.x inpainting model"),
        (folder(ONE_ENCODER, unet={**SD1_UNET, "time_cond_proj_dim": 256}), "a Stable Diffusion 1.x LCM model"),
        (folder(ONE_ENCODER, unet={**SD2_UNET, "class_embed_type": "projection"}),
         "a Stable Diffusion 2.x unCLIP model"),
        (folder(ONE_ENCODER, unet={**SD2_UNET, "in_channels": 7, "num_class_embeds": 1000}),
         "a Stable Diffusion 2.x upscaling model"),
        (folder(ONE_ENCODER, unet={**SD1_UNET, "encoder_hid_dim": 9}), "a Stable Diffusion 1.x special model"),
        (folder({}, config={"_class_name": "AutoencoderKL"}), "a VAE alone"),
        (folder({}, config={"_class_name": "ControlNetModel"}), "a ControlNet, not a base model"),
        (folder({}, config={"architectures": ["CLIPTextModel"]}), "a text encoder alone"),
        (folder({}, config={"_class_name": "Odd"}), "one part of a model, of the class Odd"),
        (folder({}, config={"architectures": 5}), "a diffusers folder without a whole model"),
        (folder({"_class_name": "FluxPipeline"}), "a model for diffusers' FluxPipeline"),
        (single_file(768), "a U-Net without a text encoder"),
        (tensors("lora_unet_x.lora_down.weight"), "a LoRA, not a base model"),
        (tensors("encoder.down.0.block.0.conv1.weight"), "a VAE alone"),
        (tensors("double_blocks.0.x"), "a FLUX model"),
        (tensors("x"), "a file of an unknown kind of model"),
        (tensors(), "a file without tensors"),
    ],
)  # fmt: skip
def test_models_are_described(summary: CheckpointSummary, description: str) -> None:
    """Each kind of model is called what users call it."""
    assert describe(summary) == description


@pytest.mark.parametrize(
    ("names", "description"),
    [
        (["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"], "a ControlNet"),
        (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.attentions.0.proj_in.weight"], "a ControlNet"),
        (["adapter.body.0.block1.weight"], "a T2I-Adapter"),
        (["body.0.block1.weight", "conv_in.weight"], "a T2I-Adapter"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
        (["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"], "a motion module of AnimateDiff"),
        (["lora_unet_x.lora_down.weight", "lora_unet_x.dora_scale"], "a DoRA, "),
        (["unet.x.lora_A.weight"], "a LoRA, "),
        (["unet.x.processor.to_q_lora.down.weight"], "a LoRA, "),
        (["text_encoder.x.lora_linear_layer.down.weight"], "a LoRA, "),
        (["base_model.model.x.lora_A.default.weight"], "a LoRA, "),
        (["lora_unet_x.hada_w1_a", "lora_unet_x.alpha"], "a LoHa, "),
        (["lora_unet_x.lokr_w1", "lora_unet_x.lokr_w2_a"], "a LoKr, "),
        (["lora_unet_x.oft_blocks"], "an OFT, "),
        (["lora_unet_x.on_input"], "an IA3, "),
        (["lora_unet_x.lora_down.weight", "lora_unet_x.lora_mid.weight"], "a LoCon with Tucker decomposition, "),
        (["lora_unet_x.strange"], "a LoRA of an unknown kind, "),
        (["lora_controlnet", "x.up", "x.lora_down.weight"], "a ControlNet, "),
        (["lora_unet_x.diff"], "a full difference, "),
        (["string_to_param.*"], "a textual-inversion embedding"),
        (["emb_params"], "a textual-inversion embedding"),
        (["model.1.sub.0.RDB1.conv1.0.weight"], "an image upscaler"),
        (["body.0.rdb1.conv1.weight"], "an image upscaler"),
        (["concept_embeds", "vision_model.vision_model.encoder.layers.0.x"], "a safety checker"),
        (["model_ema.diffusion_modelinput_blocks00weight", "model_ema.decay"], "a file with nothing but EMA copies"),
        (["model.diffusion_model.out.2.weight"], "half a model: its U-Net lacks the first layer"),
        (["first_stage_model.encoder.conv_in.weight"], "a VAE alone"),
        (["encoder.down_blocks.0.resnets.0.conv1.weight"], "a VAE alone"),
        (["encoder.layers.1.conv.0.weight", "decoder.layers.2.conv.0.weight"], "a tiny VAE for previews (TAESD)"),
        (["0.weight", "1.conv.0.weight", "2.weight"], "a tiny VAE for previews (TAESD)"),
        (["1.weight", "3.conv.0.weight", "18.bias"], "a tiny VAE for previews (TAESD)"),
        (["encoder.1.conv.0.weight", "decoder.3.conv.0.weight"], "a tiny VAE for previews (TAESD)"),
        (["taesd_decoder.3.conv.0.weight"], "a tiny VAE for previews (TAESD)"),
        (["768.0.linear.0.weight", "1280.1.linear.1.bias"], "a hypernetwork"),
        (["string_to_token.*", "string_to_param.*"], "a textual-inversion embedding"),
        (["text_model.encoder.layers.0.self_attn.q_proj.weight"], "a text encoder alone"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a text encoder (T5) alone"),
        (["model.layers.0.self_attn.q_norm.weight"], "a text encoder (Qwen3) alone"),
        (["decoder.middle.0.residual.0.gamma"], "a VAE alone, that of Qwen-Image and Anima"),
        (["vision_model.encoder.layers.0.self_attn.q_proj.weight"], "an image encoder of CLIP"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "a Stable Diffusion 3 model"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "a FLUX model"),
        (["blocks.0.attn.qkv.weight", "y_embedder.y_embedding"], "a PixArt model"),
        (["clip_txt_pooled_mapper.weight"], "a Stable Cascade model"),
    ],
)
def test_other_files_are_described(names: list[str], description: str) -> None:
    """What is no base model, and what is one of another kind, is called by its name."""
    assert describe(tensors(*names)).startswith(description)


@pytest.mark.parametrize("shape", [(768,), (4, 768), (1, 1024), (8, 1280)])
def test_embeddings_are_told_by_their_width(shape: tuple[int, ...]) -> None:
    """An embedding may have its own token for a key."""
    summary = CheckpointSummary(Path("x"), "safetensors", {"<zorp>": shape})
    assert describe(summary).startswith("a textual-inversion embedding")
    assert describe(CheckpointSummary(Path("x"), "safetensors", {"x": (9, 9)})) == "a file of an unknown kind of model"


@pytest.mark.parametrize(
    ("summary", "text"),
    [
        (tensors("lora_unet_x.lora_down.weight"), "network.weights takes a LoRA to continue from"),
        (tensors("lora_unet_x.hada_w1_a"), "network.weights"),
        (tensors("encoder.down.0.block.0.conv1.weight"), "give it as model.vae"),
        (tensors("encoder.layers.1.conv.0.weight"), "model.vae takes a full VAE"),
        (tensors("768.0.linear.0.weight"), "model.path is the base model it was trained on"),
        (folder({}, config={"_class_name": "AutoencoderKL"}), "give it as model.vae"),
        (
            single_file(768, TEXT + CLIP, channels=9),
            "train on the plain model that it was made from; the LoRA works with",
        ),
        (single_file(768, TEXT + CLIP, channels=8), "the LoRA works with the image-editing model, too"),
        (tensors("model_ema.diffusion_modelout2weight"), "take the file that has the plain weights"),
        (single_file(768, TEXT + CLIP), ""),
    ],
)
def test_what_to_do_is_said(summary: CheckpointSummary, text: str) -> None:
    """The key that takes a file, or what to take in its place, is named where there is one."""
    assert text in advice(summary)
    assert bool(text) == bool(advice(summary))


def test_traits_of_xl_list_both_encoders() -> None:
    """Text encoders are told apart by place and by the library whose layout they have."""
    summary = single_file(
        2048, f"conditioner.embedders.0.transformer.{CLIP}", f"conditioner.embedders.1.model.{OPEN_CLIP}", linear=True
    )
    traits = traits_of(summary)
    assert traits is not None
    assert (traits.text_encoders, traits.context_dim) == (("clip", "open_clip"), 2048)
