"""Trains a small Stable Diffusion XL on the pictures of the small Stable Diffusion, with sizes and crops that count.

    python examples/tiny-sd/sdxl.py /tmp/tiny-sdxl
    lorakit train examples/quickstart/config.toml --set model.path=/tmp/tiny-sdxl --set output.dir=/tmp/zorp-xl
    python examples/tiny-sd/examine.py /tmp/zorp-xl/zorp.safetensors --folder /tmp/tiny-sdxl

The VAE and the first text encoder are those of the small Stable Diffusion, of which the latter learns on. A part of the
pictures is cut out of a larger canvas, and the U-Net is told where; so what is drawn with another crop is shifted. The
script measures by how much. About an hour and a half on two processor cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from autoencoder import as_tensor, latents_of
from denoiser import TELLINGS, Denoiser, train_denoiser
from numpy.typing import NDArray
from pace import Budget
from parts import SETTINGS as SD1
from parts import load
from pictures import SIDE, training_caption, training_picture
from safetensors.torch import save_file
from score import MODEL, SUBJECTS, load_pipeline, paint, score
from torch import Tensor, nn

from lorakit.models.families.sd.infer_config import SCALING_FACTOR
from lorakit.models.families.sd.tokenizer import CaptionTokenizer
from lorakit.models.families.sdxl.checkpoint import SDXLCheckpoint
from lorakit.models.families.sdxl.text_encoder import encode_first, encode_second, join
from lorakit.models.weights.load import shapes_of
from lorakit.testing.models import make_folder, random_weights
from lorakit.utils.rng import derived_seed, keyed_generator

STEPS = 9_000
CANVAS = 80
"""Side of the canvas that cut-out pictures are cut out of."""
_CUT_OUT = 0.4
"""Share of pictures that are cut out."""
_SEED = 5
_FIRST, _SECOND = SD1["text_encoder"]["hidden_size"], 64
_FILES = {
    "unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors", "text_encoder_2": "model.safetensors",
}  # fmt: skip

SETTINGS: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": SIDE // 8,
        "block_out_channels": [64, 64, 72],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 1, 1],
        "attention_head_dim": 4,
        "use_linear_projection": True,
        "norm_num_groups": 8,
        "cross_attention_dim": _FIRST + _SECOND,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": _SECOND + 6 * 256,
    },
    "vae": {**SD1["vae"], "scaling_factor": SDXLCheckpoint.scaling_factor},
    "text_encoder": SD1["text_encoder"],
    "text_encoder_2": {
        **SD1["text_encoder"],
        "hidden_size": _SECOND,
        "intermediate_size": 4 * _SECOND,
        "projection_dim": _SECOND,
        "hidden_act": "gelu",
        "pad_token_id": 0,
    },
}
"""Arguments of each part's module: three levels, transformers at the lower two."""


class DenoiserXL(Denoiser):
    """Both text encoders and the U-Net behind them."""

    def __init__(self, text_encoder: nn.Module, text_encoder_2: nn.Module, unet: nn.Module) -> None:
        super().__init__(text_encoder, unet)
        self.text_encoder_2 = text_encoder_2

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor, sizes: Tensor) -> Tensor:  # type: ignore[override]
        """What is predicted of latents [B, 4, 8, 8] that token ids [B, 77] and sizes [B, 6] describe."""
        end = 49407
        padding = (tokens == end).cumsum(1) > 1
        ids = {"ids_1": tokens.unsqueeze(1), "ids_2": tokens.masked_fill(padding, 0).unsqueeze(1)}
        found = join(encode_first(self.text_encoder, ids), *encode_second(self.text_encoder_2, ids, end), ids)
        added = {"text_embeds": found["text_embeds"], "time_ids": sizes}
        predicted: Tensor = self.unet(latents, timesteps, found["hidden_states"], added_cond_kwargs=added).sample
        return predicted


def main() -> None:
    """Train, write and score the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the model")
    parser.add_argument("--steps", type=int, default=STEPS, help="how many steps (%(default)s)")
    parser.add_argument("--pictures", type=int, default=20_000, help="how many pictures to learn from")
    parser.add_argument("--score", type=int, default=200, help="how many held-out prompts to judge at the end")
    options = parser.parse_args()
    train(options.folder, options.steps, options.pictures)
    if options.score:
        pipeline = load_pipeline(options.folder)
        print(score(pipeline, SUBJECTS["world"], options.score))
        print(f"Cut out 12 pixels further right, pictures are shifted by {shift(pipeline, 12):.1f} pixels.")


def train(folder: Path, steps: int, pictures: int) -> None:
    """Train on so many pictures for some steps, and write the model."""
    vae, first = rescaled(load(MODEL, "vae")), load(MODEL, "text_encoder")
    model = DenoiserXL(first, build("text_encoder_2"), build("unet"))
    train_denoiser(model, learning_material(vae, _SEED, pictures), Budget(steps), _SEED)
    parts = {"vae": vae, "text_encoder": first, "text_encoder_2": model.text_encoder_2, "unet": model.unet}
    save(folder, parts)


def build(part: str) -> nn.Module:
    """The U-Net or the second text encoder with random weights; token embeddings stay as they are."""
    if part == "unet":
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        module: nn.Module = UNet2DConditionModel(**SETTINGS[part])
    else:
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModel

        module = CLIPTextModel(CLIPTextConfig(**SETTINGS[part]))
        module.text_projection = nn.Linear(_SECOND, _SECOND, bias=False)
    weights = dict(random_weights(shapes_of(module), derived_seed(_SEED, "weights", part)))
    for name, parameter in module.named_parameters():
        if "token_embedding" in name:
            weights[name] *= 25  # as large as what the layers add to them
            parameter.requires_grad_(requires_grad=False)
    module.load_state_dict(weights, strict=False)
    return module


@torch.no_grad()
def rescaled(vae: nn.Module) -> nn.Module:
    """The VAE with latents that have unit variance at SDXL's factor instead of Stable Diffusion 1.x's."""
    ratio = SCALING_FACTOR / SDXLCheckpoint.scaling_factor
    into, out_of = vae.get_submodule("quant_conv"), vae.get_submodule("post_quant_conv")
    into.weight[:4] *= ratio
    into.bias[:4] *= ratio
    into.bias[4:] += 2 * np.log(ratio)
    out_of.weight /= ratio
    return vae


@torch.no_grad()
def learning_material(vae: nn.Module, seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [count, 4, 8, 8], token ids [count, 4, 77] and sizes [count, 6] of pictures."""
    tokenize = CaptionTokenizer()
    latents, tokens, sizes = [], [], []
    for start in range(0, count, 256):
        numbers = range(start, min(start + 256, count))
        cut = [cut_out(training_picture(seed, index), place(seed, index)) for index in numbers]
        latents.append(latents_of(vae, as_tensor([picture for picture, _ in cut])))
        captions = [training_caption(seed, index, telling) for index in numbers for telling in range(TELLINGS)]
        tokens.append(tokenize(captions).view(len(numbers), TELLINGS, -1))
        sizes += [ids for _, ids in cut]
    scale = SDXLCheckpoint.scaling_factor / SCALING_FACTOR
    return torch.cat(latents) * scale, torch.cat(tokens), torch.tensor(sizes)


def place(seed: int, index: int) -> tuple[int, int] | None:
    """Where a picture is cut out of its canvas, top and left; None where it is whole."""
    draw = keyed_generator(seed, "place", index)
    if draw.random() >= _CUT_OUT:
        return None
    top, left = draw.integers(CANVAS - SIDE + 1, size=2)
    return int(top), int(left)


def cut_out(picture: NDArray[np.uint8], place: tuple[int, int] | None) -> tuple[NDArray[np.uint8], tuple[int, ...]]:
    """A picture as it is, or cut out of a canvas that goes on as its right and lower edge; and its sizes."""
    if place is None:
        return picture, (SIDE, SIDE, 0, 0, SIDE, SIDE)
    top, left = place
    canvas = np.pad(picture, ((0, CANVAS - SIDE), (0, CANVAS - SIDE), (0, 0)), mode="edge")
    return canvas[top : top + SIDE, left : left + SIDE], (CANVAS, CANVAS, top, left, SIDE, SIDE)


def shift(pipeline: Any, left: int, count: int = 50) -> float:
    """How far to the left pictures go, in pixels, where they are cut out `left` pixels further right.

    Of both pictures of a prompt, from the same noise: the shift at which they differ least.
    """
    _, prompts = SUBJECTS["world"].prompts(count, _SEED)
    sizes = {"original_size": (CANVAS, CANVAS), "target_size": (SIDE, SIDE)}
    both = [paint(pipeline, prompts, crops_coords_top_left=(0, own), **sizes) for own in (0, left)]
    found = []
    for own, other in zip(*(np.stack(pictures).astype(np.float32) for pictures in both), strict=True):
        errors = [np.abs(own[:, by:] - other[:, : SIDE - by]).mean() for by in range(SIDE // 2)]
        found.append(int(np.argmin(errors)))
    return float(np.median(found))


def save(folder: Path, parts: dict[str, nn.Module]) -> None:
    """Write the parts as a diffusers folder in float16."""
    make_folder(folder, SETTINGS, dtype="float16")
    for part, module in parts.items():
        weights = {}
        for name, tensor in module.state_dict().items():
            inner = part.startswith("text_encoder") and not name.startswith("text_projection")
            if not name.endswith("position_ids"):
                weights[f"text_model.{name}" if inner else name] = tensor.half().contiguous()
        save_file(weights, folder / part / _FILES[part], metadata={"format": "pt"})


if __name__ == "__main__":
    main()
