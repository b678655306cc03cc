"""LoRA files that are merged into a base model's weights as these are read.

W ← W + multiplier·(alpha/rank)·U·D in float32, for convolutions with U of 1×1 and D of the base's kernel size; of LoHa
and LoKr W ← W + multiplier·ΔW. A file with magnitudes (DoRA) takes W multiplier of the way to
magnitude·(W + ΔW)/‖W + ΔW‖, the norm of each output's weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from lorakit.checkpoints import CheckpointSummary, Shapes, summarize
from lorakit.checkpoints.kinds import adapter_kind
from lorakit.checkpoints.lora_names import ALPHA, DOWN, MAGNITUDE, UP
from lorakit.errors import AdapterError
from lorakit.models.interfaces import AdaptationTarget, Memo
from lorakit.models.weights import kronecker_hadamard
from lorakit.models.weights.hashing import hash_of_file, hash_of_weights
from lorakit.models.weights.load import EditTensor, ReadTensor, open_tensors
from lorakit.models.weights.lora_tensors import LoRATensors, lora_tensors
from lorakit.utils.wording import some

_OTHERS = kronecker_hadamard.LOHA | kronecker_hadamard.LOKR
_SUFFIXES = {UP, DOWN, ALPHA, MAGNITUDE, *_OTHERS}
_TINY = torch.finfo(torch.float32).tiny


@frozen(slots=False)
class MergedFile:
    """A LoRA file of any tool, and how strongly it is merged."""

    path: Path
    multiplier: float = 1.0
    targets: Sequence[AdaptationTarget] = field(default=(), repr=False)
    """The model's layers."""
    only_trains: bool = False
    """Whether it is part of the model only while that trains, and not where pictures are drawn."""

    @cached_property
    def summary(self) -> CheckpointSummary:
        """What is in the file; a `ModelError` if it cannot be read."""
        return summarize(self.path)

    @cached_property
    def names(self) -> LoRATensors:
        """Where its tensors are. Raises `AdapterError` where two have one name, or a fused layer does not fit."""
        return lora_tensors(self.summary, self.targets)

    @property
    def shapes(self) -> Shapes:
        """Shape of each tensor, by its name as sd-scripts has it; a `ModelError` if the file cannot be read."""
        return self.names.shapes

    def mismatches(self, layers: Shapes) -> Iterator[str]:
        """What in the file is not for layers with weights of these shapes, by key."""
        for name in self.shapes:
            key, _, suffix = name.partition(".")
            if key not in layers or suffix not in _SUFFIXES:
                yield f"{name} is for no layer of the base model"
        for key in dict.fromkeys(name.partition(".")[0] for name in self.shapes):
            if key in layers and (shape_mismatch := self._misfit(key, layers[key])):
                yield shape_mismatch

    def others(self, key: str) -> tuple[str, ...]:
        """The suffixes of a layer's tensors of LoHa or LoKr; none for LoRA."""
        return tuple(suffix for suffix in sorted(_OTHERS) if f"{key}.{suffix}" in self.shapes)

    def adapts(self, key: str) -> bool:
        """Whether there is an adapter for the layer with a key."""
        return f"{key}.{UP}" in self.shapes or bool(self.others(key))

    def factors(self, key: str, read: ReadTensor) -> tuple[Tensor, Tensor]:
        """The up factor of a layer's LoRA, times multiplier and alpha/rank, and the down factor; matrices, float32."""
        up, down = (self.names.read(f"{key}.{suffix}", read).float().flatten(1) for suffix in (UP, DOWN))
        alpha = self.names.read(f"{key}.{ALPHA}", read).item() if f"{key}.{ALPHA}" in self.shapes else None
        alpha = self.names.alphas.get(key) if alpha is None else alpha
        return up * self.multiplier * (1.0 if alpha is None else alpha / len(down)), down

    def _misfit(self, key: str, weight: tuple[int, ...]) -> str:
        kinds = ({UP, DOWN}, kronecker_hadamard.LOHA, kronecker_hadamard.LOKR)
        if sum(any(f"{key}.{suffix}" in self.shapes for suffix in kind) for kind in kinds) > 1:
            return f"{key} has tensors of two kinds of adapters"
        if suffixes := self.others(key):
            shapes = {suffix: self.shapes[f"{key}.{suffix}"] for suffix in suffixes}
            return _misfit_of_others(key, shapes, weight) or self._misfit_of_magnitude(key, weight)
        up, down = (self.shapes.get(f"{key}.{suffix}") for suffix in (UP, DOWN))
        if up is None or down is None:
            return f"{key} lacks {UP if up is None else DOWN}"
        ones, rank = (1, 1), down[0] if down else 0
        fits_up = up in ((weight[0], rank), (weight[0], rank, *ones))
        fits_down = down in ((rank, *weight[1:]), (rank, *weight[1:], *ones)) or (*down, *ones) == (rank, *weight[1:])
        if not fits_up or not fits_down:
            return f"{key} has factors of {list(up)} and {list(down)}, the layer's weights are {list(weight)}"
        return self._misfit_of_magnitude(key, weight)

    def _misfit_of_magnitude(self, key: str, weight: tuple[int, ...]) -> str:
        magnitude = self.shapes.get(f"{key}.{MAGNITUDE}", (weight[0],))
        if magnitude[:1] != weight[:1] or any(side != 1 for side in magnitude[1:]):
            return f"{key}.{MAGNITUDE} is {list(magnitude)}, the layer has {weight[0]} outputs"
        return ""


class Merging:
    """LoRA files that are merged one after the other."""

    def __init__(self, files: Sequence[MergedFile]) -> None:
        self._files = tuple(files)

    def __bool__(self) -> bool:
        return bool(self._files)

    def for_layers(self, targets: Sequence[AdaptationTarget]) -> Merging:
        """The same for a model with these layers."""
        return Merging([evolve(file, targets=targets) for file in self._files])

    def check(self, layers: Shapes) -> None:
        """An `AdapterError` unless all that is in the files fits layers with weights of these shapes, by key."""
        for file in self._files:
            mismatches = list(file.mismatches(layers))
            if mismatches or not file.shapes:
                reasons = some(mismatches, more=" and {} more", separator="; ") or "it is empty"
                kind = adapter_kind(file.summary).description
                raise AdapterError(
                    f"{file.path} cannot be merged into the base model: {reasons}."
                    f" It is {kind}; give a LoRA for the same kind of base model."
                )

    def edit(self, key_of: Callable[[str], str]) -> EditTensor | None:
        """What merges the files into the weights of a part; None if there are none.

        `key_of` gives the key that LoRA files have for a layer, by its path in the part's module.
        """
        opened = [(file, open_tensors(file.path)) for file in self._files]

        def merge(name: str, weight: Tensor) -> Tensor:
            key = key_of(name.removesuffix(".weight"))
            for file, read in opened:
                if name.endswith(".weight") and file.adapts(key):
                    weight = _merged(file, key, read, weight.float())
            return weight

        return merge if opened else None

    def fingerprint(self, prefix: str, memo: Memo) -> list[object]:
        """Hash and multiplier of each file that has keys with this prefix."""
        found: list[object] = []
        for file in self._files:
            own_names = [own for own in file.names.stored if own.startswith(prefix)]
            names = {name: name for own in own_names for name in file.names.sources(own)}
            if names:
                found.append(memo.get_or_compute(file.path, prefix, partial(hash_of_weights, file.path, names)))
                found.append(file.multiplier)
                found += [item for item in sorted(file.names.alphas.items()) if item[0].startswith(prefix)]
        return found

    def metadata(self, memo: Memo) -> Mapping[str, str]:
        """What LoRA files say of those that were merged before; nothing if there are none."""
        entries: dict[str, list[object]] = {}
        for file in self._files:
            entry = {
                "name": file.path.name,
                "multiplier": file.multiplier,
                "sha256": memo.get_or_compute(file.path, "sha256", partial(hash_of_file, file.path)),
            }
            entries.setdefault("ss_training_adapter" if file.only_trains else "ss_base_weights", []).append(entry)
        return {key: json.dumps(own) for key, own in entries.items()}

    @property
    def training_adapter(self) -> MergedFile | None:
        """The file that is part of the model only while it trains."""
        return next((file for file in self._files if file.only_trains), None)


def _merged(file: MergedFile, key: str, read: ReadTensor, weight: Tensor) -> Tensor:
    """A float32 weight with what a file has for it."""

    def tensor(suffix: str) -> Tensor:
        own = file.names.read(f"{key}.{suffix}", read)
        if own.is_complex() or not own.float().isfinite().all():
            found = f"{file.names.name(f'{key}.{suffix}')} holds NaN, infinity or complex numbers"
            raise AdapterError(f"{file.path} cannot be merged into the base model: {found}. Give another file.")
        return own.to(weight.device).float()

    alpha = tensor(ALPHA) if f"{key}.{ALPHA}" in file.shapes else file.names.alphas.get(key)
    if suffixes := file.others(key):
        found = {suffix: tensor(suffix) for suffix in suffixes}
        update = kronecker_hadamard.update_of(found, alpha).reshape(weight.shape)
    else:
        up, down = tensor(UP), tensor(DOWN)
        update = (up.flatten(1) @ down.flatten(1)).view_as(weight)
        if alpha is not None:
            update *= alpha / len(down)
    magnitude = tensor(MAGNITUDE) if f"{key}.{MAGNITUDE}" in file.shapes else None
    return updated(weight, update, magnitude, file.multiplier)


def updated(weight: Tensor, update: Tensor, magnitude: Tensor | None, multiplier: float) -> Tensor:
    """A weight W with an update ΔW of its shape; with magnitudes, `multiplier` of the way to the DoRA's weight."""
    if magnitude is not None:
        changed = (weight + update).flatten(1)
        changed *= magnitude.view(-1, 1) / changed.norm(dim=1, keepdim=True).clamp(min=_TINY)
        update = changed.view_as(weight) - weight
    return weight + multiplier * update


def _misfit_of_others(key: str, shapes: Shapes, weight: tuple[int, ...]) -> str:
    """Why tensors of LoHa or LoKr of these shapes do not make an update of a weight; empty if they do."""
    tensors = {suffix: torch.empty(shape, device="meta") for suffix, shape in shapes.items()}
    try:
        update = kronecker_hadamard.update_of(tensors, 1.0)
        fits = update.shape[0] == weight[0] and update.numel() == math.prod(weight)
    except KeyError as error:
        return f"{key} lacks {error.args[0].removesuffix('_a')}"
    except (RuntimeError, IndexError, TypeError, ValueError, ZeroDivisionError):
        fits = False
    described = ", ".join(f"{suffix} {list(shape)}" for suffix, shape in shapes.items())
    return "" if fits else f"{key} has {described}, the layer's weights are {list(weight)}"
