"""Writing the results: never over a file, and read back before anything is reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor

from lorakit.checkpoints.lora_names import ALPHA, DOWN, MAGNITUDE, UP
from lorakit.errors import AdapterError, OutputError
from lorakit.lora_tools.adapters import Adapter, AnyPath, LoRAFile
from lorakit.lora_tools.low_rank import relative
from lorakit.models.weights.folders import WEIGHT_SUFFIXES
from lorakit.models.weights.load import open_tensors
from lorakit.networks.adapter_file import DTYPES, Precision, write_safetensors
from lorakit.utils.atomic_io import as_output_error, commit, staging_dir, unwritable_reason


@frozen
class LayerError:
    """What the update of a layer lacks in the output, in squared norms."""

    key: str
    """The layer."""
    error: float
    """‖written − exact‖²."""
    norm: float
    """‖exact‖²."""

    @property
    def relative(self) -> float:
        """The norm of the error relative to that of the update."""
        return relative(self.error, self.norm)


@frozen
class Written:
    """A LoRA file that was written and read back."""

    path: Path
    """The file."""
    ranks: Mapping[str, int]
    """The rank of each layer, by key."""
    errors: tuple[LayerError, ...] = ()
    """How each layer's update differs from the exact one, before it is rounded to the file's number format; empty
    where it does not."""

    @property
    def error(self) -> float:
        """The norm of all errors relative to that of all updates."""
        return relative(sum(layer.error for layer in self.errors), sum(layer.norm for layer in self.errors))

    @property
    def worst(self) -> LayerError | None:
        """The layer with the largest relative error."""
        return max(self.errors, key=lambda layer: layer.relative, default=None)


def new_file(output: AnyPath) -> Path:
    """The path of a file to write; an `OutputError` if it exists, cannot be written, or has another extension."""
    path = Path(output)
    if path.suffix != ".safetensors":
        raise OutputError(f"{path} must end in .safetensors, the only format that is written here")
    return _new(path)


def new_folder(output: AnyPath) -> Path:
    """The path of a folder to write; an `OutputError` if it exists, cannot be written, or is called like a file."""
    path = Path(output)
    if path.suffix in WEIGHT_SUFFIXES:
        raise OutputError(f"{path} would be a folder, as the base model is one; give a name without {path.suffix}")
    return _new(path)


def _new(path: Path) -> Path:
    with as_output_error(path):  # a name may be too long to ask
        is_there = path.exists() or path.is_symlink()
    if is_there:
        raise OutputError(f"{path} exists already; give another name, or remove it first")
    if reason := unwritable_reason(path.parent):
        raise OutputError(f"{path}: {reason}; choose another folder")
    return path


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Where to write a file or folder that gets its name when the block ends without an error."""
    with staging_dir(path) as scratch:
        try:
            yield scratch / path.name
        except OutputError as error:  # names what was asked for, not what is removed
            raise OutputError(str(error).replace(str(scratch / path.name), str(path))) from error
        if path.exists():
            raise OutputError(f"{path} exists already, by now; give another name, or remove it first")
        commit(scratch / path.name, path)


def write_lora(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA file, and compare what is read back. Raises `OutputError` where either fails."""
    with staged(path) as written:
        with as_output_error(path):
            write_safetensors(written, tensors, metadata)
        if wrong := _first_difference(written, tensors):
            raise OutputError(f"{path} was not read back as it was written: {wrong} differs. The disk may be failing.")


def _first_difference(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """The name of a tensor that a file has otherwise; empty if there is none. Leaves the file closed."""
    read = open_tensors(path)
    return next((name for name, own in tensors.items() if not torch.equal(own, read(name))), "")


def precision_of(files: list[LoRAFile], asked: Precision | None) -> Precision:
    """The number format that is asked for; else that of the files, or float32 if they have several."""
    if asked is not None:
        return asked
    found = {
        file.read(file.names.name(name)).dtype
        for file in files
        for name in file.names.shapes
        if not name.endswith((ALPHA, MAGNITUDE))
    }
    names: Mapping[torch.dtype, Precision] = {dtype: name for name, dtype in DTYPES.items()}
    return names.get(found.pop(), "fp32") if len(found) == 1 else "fp32"


def lora_tensors_of(adapters: Mapping[str, Adapter], precision: Precision) -> tuple[dict[str, Tensor], float]:
    """The tensors of a file with these adapters, and the alpha, which is the same for all.

    It is the largest rank; the up factors of layers with smaller ranks make up for it. Raises `AdapterError` where the
    number format cannot hold a number.
    """
    dtype, largest = DTYPES[precision], max(adapter.rank for adapter in adapters.values())
    alpha = float(torch.tensor(float(largest), dtype=dtype))  # as the file can hold it
    tensors: dict[str, Tensor] = {}
    for key, adapter in adapters.items():
        ones = (1,) * (len(adapter.inputs) - 1)
        up = adapter.up * (adapter.rank / alpha)
        tensors[f"{key}.{DOWN}"] = adapter.down.view(-1, *adapter.inputs).to(dtype).contiguous()
        tensors[f"{key}.{UP}"] = up.view(*up.shape, *ones).to(dtype).contiguous()
        tensors[f"{key}.{ALPHA}"] = torch.tensor(alpha, dtype=dtype)
        if adapter.magnitude is not None:
            tensors[f"{key}.{MAGNITUDE}"] = adapter.magnitude.view(-1, 1, *ones).to(dtype).contiguous()
    overflowing = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), "")
    if overflowing:
        raise AdapterError(f"{overflowing} has numbers that {precision} cannot hold; write it with --precision fp32.")
    return tensors, alpha
