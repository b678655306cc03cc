"""State dicts as safetensors files: tensors as tensors, all else as JSON in the header.

Optimizers keep numbers, names and tensors, in dicts and lists. Unlike a pickle, such a file holds nothing that could
run when it is read.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor

from lorakit.checkpoints.safetensors_content import safetensors_content
from lorakit.checkpoints.safetensors_header import safetensors_shapes

_HEADER: Final = "structure"
_CONTAINERS: Mapping[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda pairs: Counter(dict(pairs)),
}
"""What JSON lacks, by the name of its type, made from its items; those of mappings are pairs."""


class NotSerializableError(TypeError):
    """Something that neither JSON nor safetensors has a form for."""


def serialize(content: Any) -> bytes:
    """A safetensors file of what is made of tensors, numbers, texts, None, and containers of them.

    Raises NotSerializableError where there is anything else.
    """
    packing = _Packing()
    structure = json.dumps(packing.form(content))
    return safetensors.torch.save(packing.tensors, {_HEADER: structure})


def deserialize(path: Path, device: torch.device) -> Any:
    """What was serialized into a file; tensors that were not on the CPU are on a device.

    Raises OSError, ModelError, SafetensorError, ValueError, TypeError, KeyError, AttributeError or RecursionError where
    the file is not of this kind.
    """
    safetensors_shapes(path)
    tensors, metadata = safetensors_content(path)
    return _Unpacking(tensors, device).value(json.loads(metadata[_HEADER]))


class _Packing:
    """Collects the tensors of a content while giving it a form that JSON can hold."""

    # A class, as a nested function that calls itself would keep all tensors alive until the garbage is collected.

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def form(self, value: Any) -> Any:
        """What JSON can hold of a value. Raises NotSerializableError."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            name = self._names.setdefault(id(value), str(len(self._names)))
            # A copy, as a file cannot hold two tensors that share their numbers.
            self.tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            return {"tensor": name, "on_device": value.device.type != "cpu"}
        kind = type(value).__name__
        if kind == "list":
            return [self.form(item) for item in value]
        if kind not in _CONTAINERS:
            raise NotSerializableError(f"a {type(value).__module__}.{type(value).__qualname__} has no place in a state")
        items = value.items() if isinstance(value, Mapping) else value
        return {kind: [self.form(list(item) if isinstance(value, Mapping) else item) for item in items]}


class _Unpacking:
    """Puts tensors back where a form refers to them."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._tensors = tensors
        self._device = device
        self._made: dict[str, Tensor] = {}

    def value(self, form: Any) -> Any:
        """What had a form. Raises KeyError, TypeError or ValueError where it is none."""
        if isinstance(form, list):
            return [self.value(item) for item in form]
        if not isinstance(form, dict):
            return form
        if "tensor" in form:
            name = form["tensor"]
            if name not in self._made:
                self._made[name] = self._tensors[name].to(self._device if form["on_device"] else "cpu")
            return self._made[name]
        ((kind, items),) = form.items()
        return _CONTAINERS[kind](self.value(items))
