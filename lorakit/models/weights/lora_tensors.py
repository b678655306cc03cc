"""Where a LoRA file of any tool has the tensors of a model's layers; those of fused layers are split by rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from attrs import frozen
from torch import Tensor

from lorakit.checkpoints import CheckpointSummary, Shapes
from lorakit.checkpoints.lora_files import PEFT_MAGNITUDE, lora_names, own_shapes
from lorakit.checkpoints.lora_names import ALPHA, DOWN, MAGNITUDE, UP, own_name
from lorakit.errors import AdapterError
from lorakit.models.interfaces import AdaptationTarget
from lorakit.models.weights.folders import TensorSlice


@frozen
class LoRATensors:
    """Where the tensors of a LoRA file are, for a model; each is called as sd-scripts calls it."""

    stored: Mapping[str, str | TensorSlice]
    """The name in the file of each tensor, or some rows of it."""
    shapes: Shapes
    """The shape of each tensor; one side for magnitudes of PEFT."""
    alphas: Mapping[str, float]
    """Alphas that are no tensors of the file, by the key of the layer."""

    def name(self, tensor: str) -> str:
        """The name in the file of a tensor."""
        stored = self.stored[tensor]
        return stored.name if isinstance(stored, TensorSlice) else stored

    def read(self, tensor: str, file: Callable[[str], Tensor]) -> Tensor:
        """A tensor; `file` gives those of the file by their names there."""
        stored, whole = self.stored[tensor], file(self.name(tensor))
        if PEFT_MAGNITUDE in self.name(tensor):
            whole = whole.flatten()
        return whole[stored.start : stored.stop] if isinstance(stored, TensorSlice) else whole


def lora_tensors(
    summary: CheckpointSummary, targets: Sequence[AdaptationTarget] = (), rename: Callable[[str], str] = own_name
) -> LoRATensors:
    """Where a file has the tensors of a model's layers, by any name of a layer, or of a layer that it is rows of.

    Tensors of other layers are renamed by `rename`. Raises `AdapterError` where the file has a tensor twice, invalid
    alphas, or a fused layer of another size.
    """
    keys = {name: target.key for target in targets for name in target.names}
    fused = {target.key: target.fused_in for target in targets if target.fused_in is not None}
    wholes = {rows.name for rows in fused.values()}
    names = lora_names(summary, keys | {whole: whole for whole in wholes}, rename)
    stored: dict[str, str | TensorSlice] = dict(names.in_file)
    shapes, alphas = dict(own_shapes(summary, names)), dict(names.alphas)
    for key, rows in fused.items():
        for suffix in (DOWN, UP, ALPHA, MAGNITUDE):
            own, whole = f"{key}.{suffix}", f"{rows.name}.{suffix}"
            if whole not in names.in_file:
                continue
            name, shape = names.in_file[whole], shapes[whole]
            if own in names.in_file:
                raise AdapterError(f"{summary.path} holds two adapters for one layer: {names.in_file[own]} and {name}.")
            stored[own], shapes[own] = name, shape
            # (U·D)[rows] is U[rows]·D, and each row of a weight has its own norm.
            if suffix in (UP, MAGNITUDE):
                outputs = max(part.stop for part in fused.values() if part.name == rows.name)
                if shape[:1] != (outputs,):
                    found = f"{name} is {list(shape)}, and the layer of the base model has {outputs} outputs"
                    raise AdapterError(f"{summary.path} does not fit the base model: {found}.")
                stored[own] = TensorSlice(name, rows.start, rows.stop)
                shapes[own] = (rows.stop - rows.start, *shape[1:])
        if rows.name in alphas:
            alphas[key] = alphas[rows.name]
    for whole in [own for own in stored if own.partition(".")[0] in wholes]:
        del stored[whole], shapes[whole]
    return LoRATensors(stored, shapes, alphas)
