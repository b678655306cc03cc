"""Reads weights from files: mapped into memory, once, straight to the device and number format asked for."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch

from lorakit.checkpoints import pickle_shapes, summarize
from lorakit.errors import ModelError
from lorakit.models.places import Place

ReadTensor = Callable[[Place], Tensor]
"""The tensor at that place, on the CPU, in the file's number format; its bytes are read when they are used."""

EditTensor = Callable[[str, Tensor], Tensor]
"""A tensor of a module, by its name there, as it is to be used, in any number format; made from the file's."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def open_tensors(file: Path | Sequence[Path]) -> ReadTensor:
    """The tensors of a safetensors or PyTorch file, or of several that have no name twice; runs no code from the file.

    A `ModelError` if a file cannot be read.
    """
    whole = _open_whole_tensors(file) if isinstance(file, Path) else _open_shards(file)

    def read(place: Place) -> Tensor:
        # What is in a file is there even where all other tensors are only imagined.
        with no_dispatch():
            return whole(place) if isinstance(place, str) else whole(place.name).chunk(place.count)[place.index]

    return read


def _open_shards(files: Sequence[Path]) -> Callable[[str], Tensor]:
    readers = {file: _open_whole_tensors(file) for file in files}
    homes = {name: file for file in files for name in (summarize(file).tensors if len(files) > 1 else ())}
    return lambda name: readers[homes.get(name, files[0])](name)


def _open_whole_tensors(file: Path) -> Callable[[str], Tensor]:
    from safetensors import safe_open

    try:
        with file.open("rb") as stream:
            is_safetensors = stream.read(9)[8:] == b"{"
        if is_safetensors:
            read: Callable[[str], Tensor] = safe_open(file, "pt").get_tensor
            return read
        # What passes has nothing in it that PyTorch's reader would trip over, or take more memory for than it is long.
        pickle_shapes(file)
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        tensors: Mapping[str, Tensor] = content.get("state_dict", content)
        return tensors.__getitem__
    except ModelError:
        raise
    except Exception as error:  # the readers raise all kinds of exceptions for damaged files
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{file} cannot be read ({reason}); download or convert it again") from error


def without_weights(build: Callable[[], ModuleT]) -> ModuleT:
    """A module whose parameters have shapes but no memory, for `load_weights` to fill."""
    with torch.device("meta"):
        return build()


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor that a module keeps in files."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def load_weights(
    module: nn.Module,
    file: Path | Sequence[Path],
    names: Mapping[str, Place],
    device: torch.device,
    dtype: torch.dtype,
    edit: EditTensor | None = None,
) -> None:
    """Fill a module that has no weights from a file or several; `names` has the place there of each of its tensors.

    `edit` may change each tensor, on the device, before it is put in the number format `dtype`. The module is frozen
    and in evaluation mode afterwards. On the CPU, tensors that are stored in the number format asked for stay views of
    the mapped file: they take no memory of their own.
    """
    read = open_tensors(file)
    state = {}
    for name, empty in module.state_dict().items():
        tensor = read(names[name]).reshape(empty.shape).to(device)
        state[name] = (edit(name, tensor) if edit else tensor).to(dtype)
    module.load_state_dict(state, assign=True)
    module.requires_grad_(requires_grad=False).eval()
