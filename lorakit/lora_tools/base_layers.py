"""The layers of a base model that LoRA files adapt, and where their weights are; reads no weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor

from lorakit.api.model_family import ModelFamilyConfig
from lorakit.checkpoints import CheckpointSummary, HubModel, locate, summarize
from lorakit.errors import ModelError
from lorakit.lora_tools.adapters import AnyPath
from lorakit.models.base import BaseModel
from lorakit.models.interfaces import AdaptationTarget
from lorakit.models.weights.checkpoint import CheckpointPart
from lorakit.models.weights.folders import TensorRef
from lorakit.models.weights.load import open_tensors, shapes_of
from lorakit.models.weights.modules import empty_module
from lorakit.plugins.catalog import Catalog


@frozen(eq=False)
class BaseLayer:
    """A layer's weight in a base model's files."""

    target: AdaptationTarget
    """What networks know of it."""
    part: CheckpointPart
    """The part of the model that it is in, with its files."""
    place: TensorRef
    """Where it is in its file."""
    shape: tuple[int, ...]
    """The shape of the module's weight; stored, a 1×1 convolution may be a matrix and the reverse."""
    read_stored: Callable[[TensorRef], Tensor]
    """Reads from its file."""

    def read(self) -> Tensor:
        """The weight, in the file's number format."""
        return self.read_stored(self.place).reshape(self.shape)


@frozen(eq=False)
class LayeredModel:
    """A base model by its layers."""

    path: Path
    """The file or folder."""
    summary: CheckpointSummary
    """What its header says."""
    family: type[ModelFamilyConfig]
    """The family that its plugin recognised."""
    model: BaseModel
    """The model, of which nothing is read."""
    layers: Sequence[BaseLayer]
    """All layers that can be adapted."""

    @property
    def targets(self) -> list[AdaptationTarget]:
        """The layers as networks know them."""
        return [layer.target for layer in self.layers]


def open_model(path: AnyPath) -> LayeredModel:
    """The base model at a path, a file or a diffusers folder. Raises `ModelError` where there is none."""
    location = locate(str(path), Path.cwd())
    if isinstance(location, HubModel):
        raise ModelError(
            f"{location.looked_at} does not exist; give a .safetensors or .ckpt file, or a diffusers folder"
        )
    catalog, summary = Catalog.discover(), summarize(location)
    detected = catalog.detect_model_family(summary)
    if detected.name is None:
        raise ModelError(f"{path} is {detected.title.removesuffix(', not a base model')}; give a base model")
    family = catalog.find(ModelFamilyConfig, detected.name)
    model = family(path=str(location)).build(torch.device("cpu"), torch.float32)
    if not isinstance(model, BaseModel):
        raise ModelError(f"{path} is {detected.title}, whose family does not tell where its layers are stored")
    layers = []
    for own in model.modules:
        if own.part.encoders and model.checkpoint.lacks(own.part.name):
            continue  # a file with the denoiser alone
        part = model.checkpoint.part(own.part.name)
        module, read = empty_module(part, own.build), open_tensors(part.files)
        shapes = shapes_of(module)
        places = part.find(shapes)
        for target in own.targets(module):
            name = f"{target.path}.weight"
            layers.append(BaseLayer(target, part, places[name], shapes[name], read))
    return LayeredModel(Path(path), summary, family, model, layers)
