"""Qwen-Image's VAE in files: settings, tensors, and what they are called in each layout; imports no torch.

It is Wan 2.1's VAE for videos, trained on; images are videos of one frame. Diffusers has its own names; single files
have those of the original code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from lorakit.checkpoints import Shapes
from lorakit.models.weights.checkpoint import DIFFUSERS_FILES, PartFormat, Settings

LATENT_CHANNELS = 16
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
"""The mean of each latent channel; no single file has it."""
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
"""Its standard deviation."""
ENCODER_ROOTS = ("encoder.", "quant_", "conv1.")
"""What the names of the tensors begin with, in either layout, that the encoder's output depends on."""
_DEFAULTS: Mapping[str, Any] = {
    "base_dim": 96,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "temperal_downsample": (False, True, True),
    "input_channels": 3,
    "latents_mean": LATENTS_MEAN,
    "latents_std": LATENTS_STD,
}

Tensors = Iterator[tuple[str, tuple[int, ...]]]
"""Name and shape of one tensor after the other."""

_RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
_IN_BLOCK = re.compile(r"\.(norm1|conv1|norm2|conv2)\.(?=\w+$)")
_AROUND = (
    ("quant_conv.", "conv1."),
    ("post_quant_conv.", "conv2."),
    ("encoder.conv_in.", "encoder.conv1."),
    ("decoder.conv_in.", "decoder.conv1."),
    *(
        (f"{half}.{own}", f"{half}.{original}")
        for half in ("encoder", "decoder")
        for own, original in (
            ("mid_block.resnets.0", "middle.0"), ("mid_block.attentions.0", "middle.1"),
            ("mid_block.resnets.1", "middle.2"), ("norm_out", "head.0"), ("conv_out", "head.2"),
            ("down_blocks", "downsamples"),
        )
    ),
)  # fmt: skip
"""Beginnings of names in diffusers and in the original code."""
_UP = re.compile(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)")


def original_name(name: str, res_blocks: int) -> str:
    """What the original code calls a tensor of diffusers' module with so many ResNet blocks at each level."""
    found = _UP.match(name)
    if found is not None:
        level, kind, number = int(found[1]), found[2], int(found[3])
        place = level * (res_blocks + 2) + (number if kind == "resnets" else res_blocks + 1)
        name = f"decoder.upsamples.{place}{name[found.end() :]}"
    for own, original in _AROUND:
        if name.startswith(own):
            name = original + name.removeprefix(own)
            break
    if name.startswith(("encoder.downsamples.", "decoder.upsamples.")) or ".middle." in name:
        name = _IN_BLOCK.sub(lambda match: f".{_RESIDUAL[match[1]]}.", name)
    return name.replace(".conv_shortcut.", ".shortcut.")


def infer_settings(shapes: Shapes) -> dict[str, Any]:
    """Settings of diffusers' module from the shapes in a single file of either layout.

    Raises KeyError with the name of a missing tensor, and ValueError for another number of latent channels.
    """
    original = "encoder.conv_in.weight" not in shapes
    first = shapes["encoder.conv1.weight" if original else "encoder.conv_in.weight"]
    root, conv = ("encoder.downsamples.", "residual.2") if original else ("encoder.down_blocks.", "conv1")
    latents = shapes["conv2.weight" if original else "post_quant_conv.weight"][0]
    if latents != LATENT_CHANNELS:
        raise ValueError(f"{latents} latent channels")
    numbers = sorted({int(name.removeprefix(root).split(".")[0]) for name in shapes if name.startswith(root)})
    # Channels behind each ResNet block, and None for what halves the image.
    widths = [shapes.get(f"{root}{number}.{conv}.weight", (None,))[0] for number in numbers]
    levels = [list(own) for is_block, own in groupby(widths, lambda width: width is not None) if is_block]
    halving = [f"{root}{number}" for number, width in zip(numbers, widths, strict=True) if width is None]
    return {
        "base_dim": first[0],
        "z_dim": latents,
        "dim_mult": [(own[0] or 0) // first[0] for own in levels],
        "num_res_blocks": len(levels[0]),
        "temperal_downsample": [f"{path}.time_conv.weight" in shapes for path in halving],
        "input_channels": first[1],
        "latents_mean": list(LATENTS_MEAN),
        "latents_std": list(LATENTS_STD),
    }


def vae_shapes(settings: Settings) -> Shapes:
    """The tensors of diffusers' module with these settings. Raises ValueError for some that make none."""
    given = {**_DEFAULTS, **settings}
    channels, mean, std = given["z_dim"], given["latents_mean"], given["latents_std"]
    if not len(mean) == len(std) == channels:
        raise ValueError(f"latents_mean or latents_std is not of {channels} channels")
    if not all(map(math.isfinite, mean)) or not all(0 < value < math.inf for value in std):
        raise ValueError("latents_mean must be finite, and latents_std positive")
    if given.get("attn_scales"):
        raise ValueError("attn_scales is not empty")
    return dict(_tensors(given))


def _tensors(given: Settings) -> Tensors:
    """All tensors of a VAE with these settings, all of them given."""
    latents, images = given["z_dim"], given["input_channels"]
    widths: list[int] = [given["base_dim"] * factor for factor in given["dim_mult"]]
    in_time: Sequence[bool] = given["temperal_downsample"]
    yield from _conv("encoder.conv_in", given["base_dim"], images)
    yield from _down(given["base_dim"], widths, in_time, given["num_res_blocks"])
    yield from _ends("encoder", widths[-1], widths[-1], 2 * latents)
    yield from _conv("quant_conv", 2 * latents, 2 * latents, (1, 1, 1))
    yield from _conv("post_quant_conv", latents, latents, (1, 1, 1))
    yield from _conv("decoder.conv_in", widths[-1], latents)
    yield from _up(widths[::-1], in_time[::-1], given["num_res_blocks"])
    yield from _ends("decoder", widths[-1], widths[0], images)


def _down(base: int, widths: Sequence[int], in_time: Sequence[bool], res_blocks: int) -> Tensors:
    """What the encoder has at all levels: ResNet blocks and what halves the image behind them."""
    number = 0
    for level, (inputs, width) in enumerate(pairwise([base, *widths])):
        for block in range(res_blocks):
            yield from _resnet(f"encoder.down_blocks.{number}", width if block else inputs, width)
            number += 1
        if level < len(widths) - 1:
            path = f"encoder.down_blocks.{number}"
            yield from _conv(f"{path}.resample.1", width, width, (3, 3))
            if in_time[level]:
                yield from _conv(f"{path}.time_conv", width, width, (3, 1, 1))
            number += 1


def _up(widths: Sequence[int], in_time: Sequence[bool], res_blocks: int) -> Tensors:
    """What the decoder has at all levels: ResNet blocks and what doubles the image, and halves channels, behind."""
    for level, (before, width) in enumerate(pairwise([widths[0], *widths])):
        path = f"decoder.up_blocks.{level}"
        inputs = before // 2 if level else before
        for block in range(res_blocks + 1):
            yield from _resnet(f"{path}.resnets.{block}", width if block else inputs, width)
        if level < len(widths) - 1:
            yield from _conv(f"{path}.upsamplers.0.resample.1", width // 2, width, (3, 3))
            if in_time[level]:
                yield from _conv(f"{path}.upsamplers.0.time_conv", 2 * width, width, (3, 1, 1))


def _ends(half: str, middle: int, last: int, outputs: int) -> Tensors:
    """What either half has besides its levels and its first layer."""
    attention = f"{half}.mid_block.attentions.0"
    yield f"{attention}.norm.gamma", (middle, 1, 1)
    yield from _conv(f"{attention}.to_qkv", 3 * middle, middle, (1, 1))
    yield from _conv(f"{attention}.proj", middle, middle, (1, 1))
    for number in range(2):
        yield from _resnet(f"{half}.mid_block.resnets.{number}", middle, middle)
    yield f"{half}.norm_out.gamma", (last, 1, 1, 1)
    yield from _conv(f"{half}.conv_out", outputs, last)


def _resnet(path: str, inputs: int, outputs: int) -> Tensors:
    yield f"{path}.norm1.gamma", (inputs, 1, 1, 1)
    yield from _conv(f"{path}.conv1", outputs, inputs)
    yield f"{path}.norm2.gamma", (outputs, 1, 1, 1)
    yield from _conv(f"{path}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from _conv(f"{path}.conv_shortcut", outputs, inputs, (1, 1, 1))


def _conv(path: str, outputs: int, inputs: int, kernel: tuple[int, ...] = (3, 3, 3)) -> Tensors:
    yield f"{path}.weight", (outputs, inputs, *kernel)
    yield f"{path}.bias", (outputs,)


def _renaming(_: str, shapes: Shapes, settings: Settings) -> Callable[[str], str]:
    """The function from names in diffusers' module to those in a file with these tensors."""
    if "encoder.conv_in.weight" in shapes:
        return str
    blocks = {**_DEFAULTS, **settings}["num_res_blocks"]
    return lambda name: original_name(name, blocks)


def qwen_image_vae_format(family: str) -> PartFormat:
    """How files have Qwen-Image's VAE, for the messages of a family."""
    return PartFormat(
        name="vae",
        title="VAE",
        family=family,
        files=DIFFUSERS_FILES,
        prefix="vae.",
        roots=("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "conv1.", "conv2."),
        infer=infer_settings,
        shapes=vae_shapes,
        renaming=_renaming,
    )
