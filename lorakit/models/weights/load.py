"""Reads weights from memory-mapped files, once, straight to the right device and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch

from lorakit.checkpoints import StoredTensor, kind_of_file, pickled_tensors
from lorakit.checkpoints.stored_tensor import ITEM_BYTES
from lorakit.errors import ModelError
from lorakit.models.weights.folders import SCALE_ENDS, JoinedTensors, TensorRef, TensorSlice

ReadTensor = Callable[[TensorRef], Tensor]
"""The tensor at that place, on the CPU, in the file's dtype; its bytes are read when they are used."""

EditTensor = Callable[[str, Tensor], Tensor]
"""Given a tensor's name in the module and its value in the file, the value to use, in any dtype."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def open_tensors(file: Path | Sequence[Path]) -> ReadTensor:
    """The tensors of a safetensors or PyTorch file, or of several that have no name twice; runs no code from the file.

    A `ModelError` if a file cannot be read.
    """
    files = [file] if isinstance(file, Path) else file
    opened = [_open_whole_tensors(file) for file in files]
    readers = {name: read_own for names, read_own in opened for name in names}
    scales = {f"{name.removesuffix(end)}.weight": name for name in readers for end in SCALE_ENDS if name.endswith(end)}

    def whole(name: str) -> Tensor:
        stored = readers.get(name, opened[0][1])(name)
        return stored if name not in scales else _scaled(stored, readers[scales[name]](scales[name]))

    def read(place: TensorRef) -> Tensor:
        # What is in a file is there even where all other tensors are only imagined.
        with no_dispatch():
            return _at(place, whole)

    return read


def _at(place: TensorRef, whole: Callable[[str], Tensor]) -> Tensor:
    """What is at a place in a file; `whole` reads a tensor by its name."""
    if isinstance(place, str):
        return whole(place)
    if isinstance(place, JoinedTensors):
        return torch.cat([_at(part, whole) for part in place.parts])
    stored = whole(place.name)
    return stored[place.start : place.stop] if isinstance(place, TensorSlice) else stored.T


def _scaled(stored: Tensor, scale: Tensor) -> Tensor:
    """A weight in fp8 times its scale, or one for each output, float32."""
    weight, factor = stored.float(), scale.float()
    return weight * (factor if factor.numel() == 1 else factor.view(-1, *[1] * (weight.dim() - 1)))


def _open_whole_tensors(file: Path) -> tuple[Iterable[str], Callable[[str], Tensor]]:
    """The names of a file's tensors, and what reads one by its name."""
    from safetensors import safe_open

    try:
        if kind_of_file(file) == "safetensors":
            content_of = safe_open(file, "pt")
            return content_of.keys(), content_of.get_tensor  # type: ignore[no-untyped-call]
        tensors = pickled_tensors(file)
        with file.open("rb") as stream:
            content = mmap(stream.fileno(), 0, access=ACCESS_COPY)
    except ModelError:
        raise
    except Exception as error:  # the readers raise all kinds of exceptions for damaged files
        raise _unreadable(file, error) from error

    def mapped(name: str) -> Tensor:
        try:
            return _mapped_tensor(content, tensors[name])
        except (AttributeError, RuntimeError, ValueError) as error:
            raise _unreadable(file, error) from error

    return tensors, mapped


def _unreadable(file: Path, error: Exception) -> ModelError:
    reason = str(error).strip().split("\n")[0]
    return ModelError(f"{file} cannot be read ({reason}); download or convert it again")


def _mapped_tensor(content: mmap, stored: StoredTensor) -> Tensor:
    """A tensor of a PyTorch file that is mapped into memory: a view of it, or a copy where processors need one.

    Before PyTorch 1.6, numbers lay at any address; kernels expect them at multiples of their size.
    """
    dtype, size = getattr(torch, stored.dtype), ITEM_BYTES[stored.dtype]
    start = stored.record.start_in(content) + stored.offset
    if not stored.span:
        return torch.empty(stored.shape, dtype=dtype)
    if start % size == 0:
        numbers = torch.frombuffer(content, dtype=dtype, count=stored.span, offset=start)
        return numbers.as_strided(stored.shape, stored.strides)
    raw = torch.frombuffer(content, dtype=torch.uint8, count=stored.span * size, offset=start)
    if stored.span <= math.prod(stored.shape):
        return raw.clone().view(dtype).as_strided(stored.shape, stored.strides)
    # Without what lies between the numbers, of which there may be much, the copy is never larger than the tensor.
    raw = raw.as_strided((*stored.shape, size), (*(step * size for step in stored.strides), 1))
    return raw.clone(memory_format=torch.contiguous_format).view(dtype).squeeze(-1)


def without_weights(build: Callable[[], ModuleT]) -> ModuleT:
    """A module whose parameters have shapes but no memory, for `load_weights` to fill."""
    # Nobody is to count these tensors.
    with no_dispatch(), torch.device("meta"):
        return build()


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor that a module keeps in files."""
    with no_dispatch():  # as `state_dict` makes tensors, and nobody is to count them
        return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def load_weights(
    module: nn.Module,
    file: Path | Sequence[Path],
    names: Mapping[str, TensorRef],
    device: torch.device,
    dtype: torch.dtype,
    edit: EditTensor | None = None,
) -> None:
    """Fill a module that has no weights from a file or several; `names` has the place there of each of its tensors.

    `edit` may change each tensor, on the device, before it is converted to `dtype`. The module is frozen and in
    evaluation mode afterwards. On the CPU, tensors that are stored in `dtype` stay views of the mapped file: they take
    no further memory.
    """
    read = open_tensors(file)
    state = {}
    for name, shape in shapes_of(module).items():
        tensor = read(names[name]).reshape(shape).to(device)
        state[name] = (edit(name, tensor) if edit else tensor).to(dtype)
    module.load_state_dict(state, assign=True)
    module.requires_grad_(requires_grad=False).eval()
