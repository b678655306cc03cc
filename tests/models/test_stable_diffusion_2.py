"""Stable Diffusion 2.x in all its forms, against diffusers, transformers and the published configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lorakit.builtin.model_families.sd2 import SD2Config
from lorakit.errors import ModelError
from lorakit.models.families.sd.infer_config import sd2_text_settings, unet_settings
from lorakit.models.families.sd.model import StableDiffusion
from lorakit.models.families.sd.state_dict_keys import open_clip_name, original_unet_name
from lorakit.models.families.sd.unet import Attention
from lorakit.models.weights.load import shapes_of, without_weights
from lorakit.testing.models import FULL_SD2
from tests.models.building import CPU, read, stable_diffusion
from tests.models.test_layout import assert_same_weights, configured

SD21_UNET = {
    "act_fn": "silu",
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "only_cross_attention": False,
    "out_channels": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
}
SD21_TEXT = {
    "attention_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "vocab_size": 49408,
}
TEXT = "cond_stage_model.model."
BLOCKS = f"{TEXT}transformer.resblocks."
CAPTIONS = ["", "a photo of a cat", "hey, it's 42 %", " ".join(["cat"] * 80), "猫 👍"]


def sd2(path: Path, **options: Any) -> StableDiffusion:
    """The model at a path as a Stable Diffusion 2.x."""
    return stable_diffusion(path, version="sd_v2", architecture="stable-diffusion-v2-512/lora", pad_token=0, **options)


def test_unet_settings_of_sd21_are_the_published_ones() -> None:
    """From the shapes of the full-size U-Net alone, the published config results, heads of each level included."""
    unet = without_weights(lambda: UNet2DConditionModel.from_config(SD21_UNET))
    shapes = {original_unet_name(name, SD21_UNET): shape for name, shape in shapes_of(unet).items()}
    assert configured(UNet2DConditionModel, unet_settings(shapes)) == configured(UNet2DConditionModel, SD21_UNET)


def open_clip_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Shapes of OpenCLIP's full-size text encoder with so many layers, thirds apart."""
    settings = {**FULL_SD2["text_encoder"], "num_hidden_layers": layers}
    text = without_weights(lambda: CLIPTextModel(CLIPTextConfig(**settings)))
    return {open_clip_name(name): shape for name, shape in shapes_of(text).items()}


@pytest.mark.parametrize("layers", [23, 24])
def test_text_settings_of_sd21_are_the_published_ones(layers: int) -> None:
    """From shapes alone, the published config results, whether the file has the layer that is not read or not."""
    config = CLIPTextConfig(**sd2_text_settings(open_clip_shapes(layers))).to_dict()
    assert {key: config[key] for key in SD21_TEXT} == SD21_TEXT


@pytest.mark.parametrize("form", ["tiny_sd2_file", "tiny_sd2_ckpt"])
def test_single_files_are_read_as_diffusers_reads_them(
    request: pytest.FixtureRequest, tiny_sd2: Path, form: str
) -> None:
    """U-Net, text encoder and VAE encoder have bit for bit the weights that diffusers' own converter finds."""
    file = request.getfixturevalue(form)
    pipeline = StableDiffusionPipeline.from_single_file(
        str(file), config=str(tiny_sd2), local_files_only=True, safety_checker=None
    )
    model = sd2(file)
    assert_same_weights(model.denoiser.state_dict(), pipeline.unet.state_dict())
    assert_same_weights(model.vae_encoder.module.state_dict(), pipeline.vae.state_dict())
    assert_same_weights(model.text_encoder.module.state_dict(), pipeline.text_encoder.state_dict())
    assert model.text_encoder.module.state_dict().keys() == pipeline.text_encoder.state_dict().keys()
    own = load_file(tiny_sd2 / "text_encoder" / "model.safetensors")
    plain = {name.removeprefix("text_model."): tensor for name, tensor in own.items()}
    assert_same_weights(model.text_encoder.module.state_dict(), plain)


@pytest.mark.parametrize("form", ["tiny_sd2", "tiny_sd2_file", "tiny_sd2_ckpt"])
def test_every_form_predicts_as_diffusers_does(request: pytest.FixtureRequest, tiny_sd2: Path, form: str) -> None:
    """From a folder, a safetensors file and a checkpoint come the outputs of diffusers and transformers."""
    model = sd2(request.getfixturevalue(form))
    unet = UNet2DConditionModel.from_pretrained(tiny_sd2 / "unet").eval()
    text = CLIPTextModel.from_pretrained(tiny_sd2 / "text_encoder").eval()
    tokens = model.text_encoder.tokenize(["a cat", "two dogs"])
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([1, 900])
    hidden = text(tokens["ids"][:, 0]).last_hidden_state
    conditioning = model.text_encoder.encode(tokens)
    torch.testing.assert_close(conditioning["hidden_states"], hidden)
    prediction = model.predict(latents, timesteps, conditioning)
    torch.testing.assert_close(prediction, unet(latents, timesteps, hidden).sample)
    heads = {name: module.heads for name, module in model.denoiser.named_modules() if name.endswith(".attn1")}
    assert sorted(set(heads.values())) == [1, 2]


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_clip_skip_counts_from_the_last_layer_that_is_read(tiny_sd2_file: Path, tiny_sd2: Path, clip_skip: int) -> None:
    """1 is the usual output, OpenCLIP's last layer but one; k is the k-th from there through the last normalisation."""
    encoder = sd2(tiny_sd2_file, clip_skip=clip_skip).text_encoder
    text = CLIPTextModel.from_pretrained(tiny_sd2 / "text_encoder").eval()
    tokens = encoder.tokenize(["a cat"])
    layers = text(tokens["ids"][:, 0], output_hidden_states=True).hidden_states
    torch.testing.assert_close(encoder.encode(tokens)["hidden_states"], text.final_layer_norm(layers[-clip_skip]))


def test_tokens_are_those_of_the_models_tokenizer(tiny_sd2_file: Path, tiny_sd2: Path) -> None:
    """Short captions are filled up with token 0, as transformers does with the padding that the folder states."""
    reference = CLIPTokenizer.from_pretrained(tiny_sd2 / "tokenizer")
    assert (reference.pad_token, reference.pad_token_id) == ("!", 0)
    padded = reference(CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    for path in (tiny_sd2_file, tiny_sd2):
        assert torch.equal(sd2(path).text_encoder.tokenize(CAPTIONS)["ids"][:, 0], padded)


def test_exclamation_marks_are_no_padding(tiny_sd2_file: Path) -> None:
    """Though token 0 is written `!`, an exclamation mark is the token of a word of its own, as OpenCLIP has it."""
    tokens = sd2(tiny_sd2_file).text_encoder.tokenize(["hey!", "a ! b"])["ids"]
    assert tokens[0, 0, :5].tolist() == [49406, 2189, 256, 49407, 0]
    assert tokens[1, 0, :6].tolist() == [49406, 320, 256, 321, 49407, 0]


@pytest.mark.parametrize("words", [0, 74, 75, 76, 149, 150])
def test_long_captions_end_where_the_caption_does(tiny_sd2_file: Path, tiny_sd2: Path, words: int) -> None:
    """In chunks of the padded ids, a full one ends with the end token and an empty one starts with it."""
    reference = CLIPTokenizer.from_pretrained(tiny_sd2 / "tokenizer")
    caption = " ".join(["cat"] * words)
    ids = reference(caption, padding="max_length", max_length=152, truncation=True).input_ids
    for index, chunk in enumerate(
        sd2(tiny_sd2_file, max_token_length=150).text_encoder.tokenize([caption])["ids"][0].tolist()
    ):
        expected = [49406, *ids[1 + 75 * index : 76 + 75 * index], ids[-1]]
        expected[76] = 49407 if expected[75] not in (0, 49407) else expected[76]
        expected[1] = 49407 if expected[1] == 0 else expected[1]
        assert chunk == expected


def changed(file: Path, target: Path, change: Any) -> Path:
    """A copy of a safetensors file after a change to its tensors."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, target)
    return target


def without_unread(tensors: dict[str, Tensor]) -> None:
    """Change, or leave out, all that Stable Diffusion does not read of OpenCLIP's text encoder."""
    for name in list(tensors):
        if name.startswith(f"{BLOCKS}3."):
            tensors[name] += 1
    for name in ("text_projection", "logit_scale", "attn_mask"):
        del tensors[TEXT + name]


def test_what_is_not_read_does_not_matter(tiny_sd2_file: Path, tmp_path: Path) -> None:
    """The last layer, the projection, the scale and the mask change neither weights nor fingerprint."""
    other = sd2(changed(tiny_sd2_file, tmp_path / "x.safetensors", without_unread))
    assert other.fingerprint("text_encoder") == sd2(tiny_sd2_file).fingerprint("text_encoder")
    assert_same_weights(other.text_encoder.module.state_dict(), sd2(tiny_sd2_file).text_encoder.module.state_dict())


@pytest.mark.parametrize("third", [0, 1, 2])
def test_fingerprint_covers_each_third(tiny_sd2_file: Path, tmp_path: Path, third: int) -> None:
    """A change to queries, keys or values of a layer that is read changes the fingerprint."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{BLOCKS}1.attn.in_proj_weight"].chunk(3)[third][0, 0] += 1

    other = sd2(changed(tiny_sd2_file, tmp_path / "x.safetensors", change))
    assert other.fingerprint("text_encoder") != sd2(tiny_sd2_file).fingerprint("text_encoder")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("transformer.resblocks.1.attn.in_proj_weight", None, r"lacks transformer\.resblocks\.1\.attn\.in_proj_weight"),
        ("transformer.resblocks.1.attn.in_proj_weight", (97, 32), r"has: transformer\.resblocks\.1\.attn\.in_proj_w"),
        ("transformer.resblocks.1.attn.in_proj_weight", (), r"has: transformer\.resblocks\.1\.attn\.in_proj_weight"),
        ("transformer.resblocks.1.attn.in_proj_weight", (99, 32), r"in_proj_weight\[.\] is \(33, 32\), not \(32, 32\)"),
        ("transformer.resblocks.1.extra.weight", (3,), r"has: transformer\.resblocks\.1\.extra\.weight"),
        ("positional_embedding", None, r"lacks positional_embedding; the file is incomplete or another"),
    ],
)  # fmt: skip
def test_damaged_text_encoders_are_named(
    tiny_sd2_file: Path, tmp_path: Path, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    """Tensors that are missing, too many or of another shape are named as they are in the file."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop(TEXT + name, None)
        if shape is not None:
            tensors[TEXT + name] = torch.zeros(shape)

    path = changed(tiny_sd2_file, tmp_path / "x.safetensors", change)
    with pytest.raises(ModelError, match=rf"the text encoder in .*x\.safetensors.*{message}"):
        read(sd2(path), "text_encoder")


@pytest.mark.parametrize("upcast", [True, False])
def test_attention_is_upcast_where_the_folder_says_so(tiny_sd2: Path, tmp_path: Path, upcast: bool) -> None:
    """`upcast_attention` in the U-Net's config says for all attention that scores are to be computed in float32."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_sd2, copy)
    config = copy / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "upcast_attention": upcast}))
    attentions = [module for module in sd2(copy).denoiser.modules() if isinstance(module, Attention)]
    assert {attention.upcasts for attention in attentions} == {upcast}


@pytest.mark.parametrize(
    ("prediction", "version", "said"), [("epsilon", "sd_v2", "epsilon"), ("v_prediction", "sd_v2_v", "v")]
)
def test_metadata_names_the_version(tiny_sd2_file: Path, prediction: str, version: str, said: str) -> None:
    """LoRA files say that they are for 2.x, and what the U-Net predicts."""
    config = SD2Config(path=str(tiny_sd2_file), prediction=prediction)
    entries = config.build(CPU, torch.float32).metadata()
    assert (entries["ss_v2"], entries["ss_base_model_version"]) == ("True", version)
    assert entries["modelspec.prediction_type"] == said
