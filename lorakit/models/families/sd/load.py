"""From a stored part to a module with its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from lorakit.errors import ModelError
from lorakit.models.families.sd.checkpoint import CheckpointPart
from lorakit.models.families.sd.unet import BasicTransformerBlock, ResnetBlock2D, UNet, UNetConfig
from lorakit.models.memory.compile import compile_blocks
from lorakit.models.weights.load import EditTensor, load_weights, shapes_of, without_weights


def empty_module(part: CheckpointPart, build: Callable[[], nn.Module]) -> nn.Module:
    """The module that `build` makes, its parameters without memory; a `ModelError` if the settings make none."""
    try:
        return without_weights(build)
    except Exception as error:  # the libraries raise all kinds of exceptions for settings that they cannot use
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{part} has settings that make no sense ({reason}); it is damaged or of another kind"
        ) from error


def read_module(
    part: CheckpointPart,
    build: Callable[[], nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    without: Sequence[str] = (),
    edit: EditTensor | None = None,
) -> nn.Module:
    """The module that `build` makes, frozen, with the part's weights; those of the children `without` are not read.

    `edit` may change weights as they are read. A `ModelError` if the part's settings make no module, or its weights do
    not fit the module.
    """
    module = empty_module(part, build)
    part.check_complete(shapes_of(module))
    for child in without:
        delattr(module, child)
    load_weights(module, part.files, part.find(shapes_of(module)), device, dtype, edit)
    return module


def compile_unet(unet: nn.Module, backend: str | None) -> None:
    """Let torch.compile compile a U-Net's ResNet and transformer blocks when they first run; None undoes it."""
    compile_blocks(unet, (ResnetBlock2D, BasicTransformerBlock), backend)


def unet_module(part: CheckpointPart) -> UNet:
    """A module for the U-Net, its weights still to be read."""
    return UNet(UNetConfig.of(part.settings))


def read_unet(
    part: CheckpointPart, device: torch.device, dtype: torch.dtype, edit: EditTensor | None = None
) -> nn.Module:
    """The U-Net's module with its weights, frozen; a `ModelError` if they do not fit."""
    return read_module(part, partial(unet_module, part), device, dtype, edit=edit)
