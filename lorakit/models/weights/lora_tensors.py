"""Where a LoRA file of any tool has the tensors of a model's layers, whatever the layers are called or fused there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from attrs import frozen
from torch import Tensor

from lorakit.checkpoints import CheckpointSummary, Shapes
from lorakit.checkpoints.lora_files import PEFT_MAGNITUDE, lora_names, own_shapes
from lorakit.checkpoints.lora_names import denoiser_key, own_name
from lorakit.models.interfaces import AdaptationTarget
from lorakit.models.weights.folders import TensorSlice
from lorakit.models.weights.fused_lora import Computed, FusedLayers


@frozen
class LoRATensors:
    """Where the tensors of a LoRA file are, for a model; each is called as sd-scripts calls it."""

    stored: Mapping[str, str | Computed]
    """The name in the file of each tensor, or how it is computed from others."""
    shapes: Shapes
    """The shape of each tensor; one side for magnitudes of PEFT."""
    alphas: Mapping[str, float]
    """Alphas that are no tensors of the file, by the key of the layer."""

    def name(self, tensor: str) -> str:
        """The name in the file of a tensor, or of the first of those that it is computed from."""
        return self.sources(tensor)[0]

    def sources(self, tensor: str) -> tuple[str, ...]:
        """The names in the file of the tensors that one comes from."""
        stored = self.stored[tensor]
        return stored.names if isinstance(stored, Computed) else (stored,)

    def read(self, tensor: str, file: Callable[[str], Tensor]) -> Tensor:
        """A tensor; `file` gives those of the file by their names there."""
        stored = self.stored[tensor]
        found = [
            file(name).flatten() if PEFT_MAGNITUDE in name and len(self.shapes[tensor]) == 1 else file(name)
            for name in self.sources(tensor)
        ]
        return stored.compute(found) if isinstance(stored, Computed) else found[0]


def lora_tensors(
    summary: CheckpointSummary, targets: Sequence[AdaptationTarget] = (), rename: Callable[[str], str] = own_name
) -> LoRATensors:
    """Where a file has the tensors of a model's layers, by any name of a layer.

    Adapters of fused layers are split among layers that are their rows, and those of separate layers put together where
    the model has them fused. Tensors of other layers are renamed by `rename`. Raises `AdapterError` where the file has
    a tensor twice, invalid alphas, or layers that cannot be split or put together.
    """
    keys = {_flat(name): target.key for target in targets for name in (*target.names, target.key)}
    keys |= {name: target.key for target in targets for name in target.names}
    wholes: dict[str, dict[str, TensorSlice]] = {}
    parts: dict[str, dict[str, TensorSlice]] = {}
    for target in targets:
        if target.fused_in is not None:
            wholes.setdefault(_flat(target.fused_in.name), {})[target.key] = target.fused_in
        if target.fused_from:
            parts[target.key] = {_flat(rows.name): rows for rows in target.fused_from}
    others = [*wholes, *(key for own in parts.values() for key in own)]
    named = {rows.name: _flat(rows.name) for target in targets for rows in target.fused_from}
    names = lora_names(summary, {**dict(zip(others, others, strict=True)), **named, **keys}, rename)
    found = FusedLayers(summary, dict(names.in_file), dict(own_shapes(summary, names)), dict(names.alphas))
    for whole, rows in wholes.items():
        found.split(whole, rows)
    for key, rows in parts.items():
        found.join(key, rows)
    return LoRATensors(found.stored, found.shapes, found.alphas)


def _flat(name: str) -> str:
    """A dotted path in a denoiser as a key; keys, and paths in text encoders, as they are."""
    return denoiser_key(name) or name
