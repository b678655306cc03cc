"""Modules of a model's parts: built from their settings, and filled with their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lorakit.errors import ModelError
from lorakit.models.weights.checkpoint import CheckpointPart
from lorakit.models.weights.load import EditTensor, load_weights, shapes_of, without_weights


def empty_module(part: CheckpointPart, build: Callable[[CheckpointPart], nn.Module]) -> nn.Module:
    """The module that `build` makes, its parameters without memory; a `ModelError` if the settings make none."""
    try:
        return without_weights(lambda: build(part))
    except Exception as error:  # the libraries raise all kinds of exceptions for settings that they cannot use
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{part} has settings that make no sense ({reason}); it is damaged or of another kind"
        ) from error


def read_module(
    part: CheckpointPart,
    build: Callable[[CheckpointPart], nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    *,
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
