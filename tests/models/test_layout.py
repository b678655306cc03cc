"""Single files in the original layout, against diffusers' own reading of them and the published configs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from lorakit.errors import ModelError
from lorakit.models.families.sd.infer_config import clip_settings, unet_settings, vae_settings
from lorakit.models.families.sd.state_dict_keys import original_unet_name, original_vae_name
from lorakit.models.weights.load import shapes_of, without_weights
from tests.models.building import read, stable_diffusion

SD15_UNET = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SD15_VAE = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "scaling_factor": 0.18215,
}
SD15_TEXT = {
    "attention_dropout": 0.0,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
}


def configured(build: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What diffusers makes of settings, defaults included, with lists for tuples."""
    config = without_weights(lambda: build.from_config(settings)).config
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items() if key[0] != "_"}


def test_unet_settings_of_sd15_are_the_published_ones() -> None:
    """From the shapes of the full-size U-Net alone, its published config results, defaults included."""
    unet = without_weights(lambda: UNet2DConditionModel.from_config(SD15_UNET))
    shapes = {original_unet_name(name, SD15_UNET): shape for name, shape in shapes_of(unet).items()}
    assert configured(UNet2DConditionModel, unet_settings(shapes)) == configured(UNet2DConditionModel, SD15_UNET)


def test_vae_settings_of_sd15_are_the_published_ones() -> None:
    """From the shapes of the full-size VAE alone, its published config results, defaults included."""
    vae = without_weights(lambda: AutoencoderKL.from_config(SD15_VAE))
    original = {original_vae_name(name, SD15_VAE): shape for name, shape in shapes_of(vae).items()}
    for shapes in (original, shapes_of(vae)):
        assert configured(AutoencoderKL, vae_settings(shapes)) == configured(AutoencoderKL, SD15_VAE)


def test_text_settings_of_sd15_are_the_published_ones() -> None:
    """From the shapes of CLIP's text encoder alone, its published config results."""
    text = without_weights(lambda: CLIPTextModel(CLIPTextConfig(**SD15_TEXT)))
    config = CLIPTextConfig(**clip_settings(shapes_of(text))).to_dict()
    assert {key: config[key] for key in SD15_TEXT} == SD15_TEXT


@pytest.fixture(scope="module", params=["tiny_sd1_file", "tiny_sd1_ckpt"])
def single_file(request: pytest.FixtureRequest) -> Path:
    """The tiny model as one file, in both formats."""
    return request.getfixturevalue(request.param)


def assert_same_weights(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """All of our module's tensors are in the other state dict, bit for bit."""
    assert ours
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_single_files_are_read_as_diffusers_reads_them(single_file: Path, tiny_sd1: Path) -> None:
    """U-Net, text encoder and VAE encoder have bit for bit the weights that diffusers' own converter finds."""
    pipeline = StableDiffusionPipeline.from_single_file(
        str(single_file), config=str(tiny_sd1), local_files_only=True, safety_checker=None
    )
    model = stable_diffusion(single_file)
    assert_same_weights(model.denoiser.state_dict(), pipeline.unet.state_dict())
    assert_same_weights(model.vae_encoder.module.state_dict(), pipeline.vae.state_dict())
    assert_same_weights(model.text_encoder.module.state_dict(), pipeline.text_encoder.state_dict())
    assert model.denoiser.state_dict().keys() == pipeline.unet.state_dict().keys()
    assert_same_weights(load_file(tiny_sd1 / "vae" / "diffusion_pytorch_model.safetensors"), pipeline.vae.state_dict())


def test_every_form_of_a_model_predicts_the_same(tiny_sd1: Path, tiny_sd1_file: Path, tiny_sd1_ckpt: Path) -> None:
    """From a folder, a safetensors file and a checkpoint come the same latents and predictions, bit for bit."""
    torch.manual_seed(0)
    images, latents = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 4, 8, 8)
    outputs = []
    for path in (tiny_sd1, tiny_sd1_file, tiny_sd1_ckpt):
        model = stable_diffusion(path)
        conditioning = model.text_encoder.encode(model.text_encoder.tokenize(["a cat"]))
        prediction = model.predict(latents, torch.tensor([500]), conditioning)
        outputs.append(torch.cat([prediction, *model.vae_encoder.encode(images)]))
    assert outputs[0].isfinite().all()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("variant", ["", ".fp16"])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_folders_with_other_files(tiny_sd1: Path, tmp_path: Path, suffix: str, variant: str) -> None:
    """Folders with PyTorch's files, or with the half-precision variant only, are read alike."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_sd1, copy)
    for file in copy.glob("*/*.safetensors"):
        tensors = load_file(file)
        file.unlink()
        if suffix == ".safetensors":
            save_file(tensors, file.with_name(f"{file.stem}{variant}.safetensors"))
        else:
            stem = "pytorch_model" if file.stem == "model" else file.stem
            torch.save(tensors, file.with_name(f"{stem}{variant}.bin"))
    for part in ("denoiser", "vae_encoder", "text_encoder"):
        assert read(stable_diffusion(copy), part)


def test_text_encoder_without_its_upper_level(tiny_sd1_file: Path, tmp_path: Path) -> None:
    """Files that leave `text_model` out of the text encoder's names are read alike."""
    short = tmp_path / "short.safetensors"
    save_file({name.replace("text_model.", ""): tensor for name, tensor in load_file(tiny_sd1_file).items()}, short)
    ours = stable_diffusion(short).text_encoder.module.state_dict()
    assert_same_weights(ours, stable_diffusion(tiny_sd1_file).text_encoder.module.state_dict())


def test_ema_weights_are_ignored(tiny_sd1_file: Path, tmp_path: Path) -> None:
    """A file that also holds averaged weights gives the plain ones."""
    tensors = load_file(tiny_sd1_file)
    averaged = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": torch.full_like(tensor, 9.0)
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    save_file({**tensors, **averaged}, tmp_path / "ema.safetensors")
    ours = stable_diffusion(tmp_path / "ema.safetensors").denoiser.state_dict()
    assert_same_weights(ours, stable_diffusion(tiny_sd1_file).denoiser.state_dict())


def other_vae(folder: Path, form: str, target: Path) -> Path:
    """The folder's VAE with all weights doubled, stored in one of the forms that VAEs are found in."""
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    tensors = {name: tensor * 2 for name, tensor in vae.state_dict().items()}
    if form == "folder":
        vae.load_state_dict(tensors)
        vae.save_pretrained(target)
        return target
    if form == "diffusers":
        pass
    elif form == "old diffusers":
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new_name, old_name in old.items():
            tensors = {name.replace(f".{new_name}.", f".{old_name}."): tensor for name, tensor in tensors.items()}
    else:
        prefix = "first_stage_model." if form == "original with prefix" else ""
        tensors = {prefix + original_vae_name(name, vae.config): tensor for name, tensor in tensors.items()}
        tensors["loss.logvar"] = torch.zeros(())
    if form == "original":
        torch.save({"state_dict": tensors}, target.with_suffix(".pt"))
        return target.with_suffix(".pt")
    save_file(tensors, target.with_suffix(".safetensors"))
    return target.with_suffix(".safetensors")


@pytest.mark.parametrize("form", ["folder", "diffusers", "old diffusers", "original", "original with prefix"])
def test_another_vae_replaces_the_models_own(tiny_sd1_file: Path, tiny_sd1: Path, tmp_path: Path, form: str) -> None:
    """A VAE is taken from a folder or file, in old and new names, with and without prefix; the rest stays."""
    model = stable_diffusion(tiny_sd1_file, vae=other_vae(tiny_sd1, form, tmp_path / "vae"))
    own = stable_diffusion(tiny_sd1_file)
    doubled = {name: tensor * 2 for name, tensor in own.vae_encoder.module.state_dict().items()}
    assert_same_weights(model.vae_encoder.module.state_dict(), doubled)
    assert_same_weights(model.denoiser.state_dict(), own.denoiser.state_dict())


def test_a_file_without_a_vae_is_no_vae(tiny_sd1_file: Path, tmp_path: Path) -> None:
    """A file that is something else is refused as a VAE, and called what it is."""
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 8)}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match=r"lora\.safetensors holds no VAE; it is a LoRA$"):
        read(stable_diffusion(tiny_sd1_file, vae=tmp_path / "lora.safetensors"), "vae_encoder")


def changed(file: Path, target: Path, change: Any) -> Path:
    """A copy of a safetensors file after a change to its tensors."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, target)
    return target


NORM = "model.diffusion_model.middle_block.0.in_layers.0.weight"


def test_missing_tensors_are_named(tiny_sd1_file: Path, tmp_path: Path) -> None:
    """A U-Net that lacks a tensor is refused by the tensor's name in the file."""
    path = changed(tiny_sd1_file, tmp_path / "x.safetensors", lambda tensors: tensors.pop(NORM))
    with pytest.raises(ModelError, match=r"U-Net in .*x\.safetensors lacks middle_block\.0\.in_layers\.0\.weight"):
        read(stable_diffusion(path), "denoiser")


def test_tensors_too_many_are_named(tiny_sd1_file: Path, tmp_path: Path) -> None:
    """A U-Net with a tensor that Stable Diffusion has not is refused by the tensor's name in the file."""
    extra = {"model.diffusion_model.extra.weight": torch.zeros(1)}
    path = changed(tiny_sd1_file, tmp_path / "x.safetensors", lambda tensors: tensors.update(extra))
    with pytest.raises(ModelError, match=r"none of Stable Diffusion has: extra\.weight"):
        read(stable_diffusion(path), "denoiser")


def test_wrong_shapes_are_named(tiny_sd1_file: Path, tmp_path: Path) -> None:
    """A tensor of a shape that does not fit the others is refused with both shapes."""
    path = changed(tiny_sd1_file, tmp_path / "x.safetensors", lambda tensors: tensors.update({NORM: torch.ones(7)}))
    with pytest.raises(ModelError, match=r"in_layers\.0\.weight is \(7,\), not \(64,\)"):
        read(stable_diffusion(path), "denoiser")


def test_only_the_part_asked_for_is_needed(tiny_sd1_file: Path, tmp_path: Path) -> None:
    """The text encoder is read from a file whose U-Net is incomplete."""
    path = changed(tiny_sd1_file, tmp_path / "x.safetensors", lambda tensors: tensors.pop(NORM))
    tokens = {"ids": torch.full((1, 1, 77), 49407)}
    assert stable_diffusion(path).text_encoder.encode(tokens)["hidden_states"].shape == (1, 77, 32)


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("unet", {"norm_num_groups": 7}),
        ("unet", {"block_out_channels": [-1, 2, 3, 4]}),
        ("unet", {"layers_per_block": 2}),
        ("text_encoder", {"hidden_size": "wide"}),
        ("text_encoder", {"num_attention_heads": 5}),
        ("vae", {"latent_channels": 8}),
    ],
)
def test_settings_that_make_no_model_are_refused(
    tiny_sd1: Path, tmp_path: Path, part: str, settings: dict[str, Any]
) -> None:
    """A config that contradicts itself or the weights gives a message with the part and its file."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_sd1, copy)
    config = copy / part / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    model = stable_diffusion(copy)
    with pytest.raises(ModelError, match=r"the (U-Net|text encoder|VAE) in .*safetensors"):
        read(model, {"unet": "denoiser", "vae": "vae_encoder"}.get(part, part))
