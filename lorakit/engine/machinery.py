"""State dicts as safetensors files: tensors as tensors, all else as JSON in the header.

What a library of optimizers keeps is numbers, names and tensors, in dicts and lists. Such a file holds nothing that
could run when it is read, as a pickle could.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from lorakit.checkpoints.safetensors_header import safetensors_shapes

_HEADER: Final = "machinery"
_CONTAINERS: Mapping[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda pairs: Counter(dict(pairs)),
}
"""What JSON has no form for, by the name of its type, made from its items; those of mappings are pairs."""


class NoFormError(TypeError):
    """Something that neither JSON nor safetensors has a form for."""


def packed(content: Any) -> bytes:
    """A safetensors file of what is made of tensors, numbers, texts, None, and containers of them.

    Raises NoFormError where there is anything else.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def form(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            name = names.setdefault(id(value), str(len(names)))
            # A copy of its own, as a file cannot hold two tensors that share their numbers.
            tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            return {"tensor": name, "on_device": value.device.type != "cpu"}
        kind = type(value).__name__
        if kind == "list":
            return [form(item) for item in value]
        if kind not in _CONTAINERS:
            raise NoFormError(f"a {type(value).__module__}.{type(value).__qualname__} has no place in a state")
        items = value.items() if isinstance(value, Mapping) else value
        return {kind: [form(list(item) if isinstance(value, Mapping) else item) for item in items]}

    structure = json.dumps(form(content))
    return safetensors.torch.save(tensors, {_HEADER: structure})


def unpacked(path: Path, device: torch.device) -> Any:
    """What was packed into a file; tensors that were not on the CPU are on a device.

    Raises OSError, ModelError, SafetensorError, ValueError, TypeError, KeyError, AttributeError or RecursionError where
    the file is no such one.
    """
    safetensors_shapes(path)
    made: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:

        def value(form: Any) -> Any:
            if isinstance(form, list):
                return [value(item) for item in form]
            if not isinstance(form, dict):
                return form
            if "tensor" in form:
                name = form["tensor"]
                if name not in made:
                    made[name] = file.get_tensor(name).to(device if form["on_device"] else "cpu")
                return made[name]
            ((kind, items),) = form.items()
            return _CONTAINERS[kind](value(items))

        return value(json.loads((file.metadata() or {})[_HEADER]))
