"""LoRA files whose layers are fused differently from the model's, such as queries, keys and values in one layer.

Of a fused layer W = [W₁; W₂; W₃] with one adapter U·D, a part has the rows U₁·D. Where U is block-diagonal, the part
needs only its own rows of D. The other way, adapters of rank r of the parts are one of rank 3r: D₁ to D₃ below each
other, and U block-diagonal. What alpha/rank multiplies is the same before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import torch
from attrs import define, field, frozen
from torch import Tensor

from lorakit.checkpoints import CheckpointSummary
from lorakit.checkpoints.lora_names import ALPHA, DOWN, MAGNITUDE, UP
from lorakit.errors import AdapterError
from lorakit.models.weights.folders import TensorSlice
from lorakit.models.weights.load import ReadTensor, open_tensors

_BY_ROW = ("hada_w1_a", "hada_w2_a")
"""The tensors of a LoHa that have a row for each output; a row of a Hadamard product is that of its factors' rows."""
_SHARED = ("hada_w1_b", "hada_w2_b")
_HALVES = (torch.float16, torch.bfloat16)


@frozen(eq=False)
class Computed:
    """A tensor that is computed from those of a file."""

    names: tuple[str, ...]
    """The names in the file."""
    compute: Callable[[Sequence[Tensor]], Tensor]
    """The tensor, from those of the names."""


@define(eq=False, slots=False)
class FusedLayers:
    """The tensors of a file by their names here, to be changed to the layers that the model has."""

    summary: CheckpointSummary
    """The file."""
    stored: dict[str, str | Computed]
    """Where each tensor is."""
    shapes: dict[str, tuple[int, ...]]
    """The shape of each tensor."""
    alphas: dict[str, float]
    """Alphas that are no tensors, by key."""
    _suffixes: dict[str, set[str]] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        for name in self.stored:
            key, _, suffix = name.partition(".")
            self._suffixes.setdefault(key, set()).add(suffix)

    def split(self, whole: str, parts: Mapping[str, TensorSlice]) -> None:
        """Give each of the model's layers what the file has for the layer `whole`, whose rows they are, by key."""
        suffixes = self._suffixes.pop(whole, set())
        if not suffixes:
            return
        self._refuse_both(whole, parts)
        if foreign := sorted(suffixes - {DOWN, UP, ALPHA, MAGNITUDE, *_BY_ROW, *_SHARED}):
            self._refuse(f"{whole}.{foreign[0]} is for a layer that the model has in parts, and cannot be split")
        outputs = max(rows.stop for rows in parts.values())
        for suffix in sorted(suffixes & {UP, MAGNITUDE, *_BY_ROW}):
            if (shape := self.shapes[f"{whole}.{suffix}"])[:1] != (outputs,):
                found = f"{self._name(f'{whole}.{suffix}')} is {list(shape)}"
                self._refuse(f"{found}, and the layer of the base model has {outputs} outputs", "does not fit")
        rank = self._rank_of_blocks(whole, parts, suffixes)
        for number, (key, rows) in enumerate(sorted(parts.items(), key=lambda item: item[1].start)):
            for suffix in suffixes:
                self._take(f"{whole}.{suffix}", f"{key}.{suffix}", rows, (number * rank, rank))
            if whole in self.alphas:
                share = rank / self.shapes[f"{whole}.{UP}"][1] if rank else 1.0
                self.alphas[key] = self.alphas[whole] * share
        for suffix in suffixes:
            del self.stored[f"{whole}.{suffix}"], self.shapes[f"{whole}.{suffix}"]
        self.alphas.pop(whole, None)

    def join(self, key: str, parts: Mapping[str, TensorSlice]) -> None:
        """Give a layer of the model what the file has for the layers that are its rows, by key."""
        there = {part: rows for part, rows in parts.items() if part in self._suffixes}
        if not there:
            return
        self._refuse_both(key, there)
        for part, rows in there.items():
            self._check_part(part, rows.stop - rows.start)
        downs, ups = ([f"{part}.{suffix}" for part in there] for suffix in (DOWN, UP))
        if len({self.shapes[name][1:] for name in downs}) > 1:
            self._refuse(f"{self._name(downs[0])} and others for one layer have different numbers of inputs")
        ranks = [self.shapes[name][0] for name in downs]
        scales = [self._alpha(part, rank) / rank for part, rank in zip(there, ranks, strict=True)]
        total, outputs = sum(ranks), max(rows.stop for rows in parts.values())
        common = scales[0] if len(set(scales)) == 1 else None
        factors, places = [1.0] * len(scales) if common is not None else scales, list(there.values())

        def up_factor(found: Sequence[Tensor]) -> Tensor:
            return _block_diagonal(found, places, outputs, factors)

        joined = {
            f"{key}.{DOWN}": (downs, lambda found: torch.cat([own.flatten(1) for own in found])),
            f"{key}.{UP}": (ups, up_factor),
        }
        shapes = {f"{key}.{DOWN}": (total, self.shapes[downs[0]][1]), f"{key}.{UP}": (outputs, total)}
        magnitudes = [f"{part}.{MAGNITUDE}" for part in parts]
        if any(name in self.stored for name in magnitudes):
            if lacking := next((name for name in magnitudes if name not in self.stored), ""):
                self._refuse(f"it lacks {lacking}, and the model has one layer for all of these magnitudes")
            joined[f"{key}.{MAGNITUDE}"] = magnitudes, lambda found: torch.cat([own.reshape(-1, 1) for own in found])
            shapes[f"{key}.{MAGNITUDE}"] = (outputs, 1)
        computed = {own: Computed(self._sources(names), compute) for own, (names, compute) in joined.items()}
        self._drop(there)
        self.alphas[key] = float(total) if common is None else common * total
        self.stored |= computed
        self.shapes |= shapes

    def _take(self, source: str, target: str, rows: TensorSlice, block: tuple[int, int]) -> None:
        """Make a tensor of a part from that of the whole; `block` is where its ranks begin, and how many, 0 for all."""
        suffix, shape, (first, rank) = source.partition(".")[2], self.shapes[source], block
        outputs, ranks = slice(rows.start, rows.stop), slice(first, first + rank) if rank else slice(None)
        size = rows.stop - rows.start
        if suffix == UP:
            compute, shape = (lambda found: found[0][outputs, ranks]), (size, rank or shape[1], *shape[2:])
        elif suffix in (MAGNITUDE, *_BY_ROW):
            compute, shape = (lambda found: found[0][outputs]), (size, *shape[1:])
        elif suffix == DOWN and rank:
            compute, shape = (lambda found: found[0][ranks]), (rank, *shape[1:])
        elif suffix == ALPHA and rank:
            share = rank / self.shapes[f"{source.removesuffix(ALPHA)}{UP}"][1]
            compute = lambda found: found[0].double() * share  # noqa: E731
        else:
            self.stored[target], self.shapes[target] = self.stored[source], shape
            return
        self.stored[target], self.shapes[target] = Computed(self._sources([source]), compute), shape

    def _rank_of_blocks(self, whole: str, parts: Mapping[str, TensorSlice], suffixes: set[str]) -> int:
        """The rank of each part if the up factor is block-diagonal, one block for each part; else 0."""
        if not suffixes >= {DOWN, UP}:
            return 0
        shape = self.shapes[f"{whole}.{UP}"]
        rank, rest = divmod(shape[1], len(parts)) if len(shape) > 1 else (0, 0)
        if rest or not rank or len(parts) < 2:
            return 0
        up = self._read(self._name(f"{whole}.{UP}")).flatten(1)
        for number, rows in enumerate(sorted(parts.values(), key=lambda rows: rows.start)):
            own = up[rows.start : rows.stop]
            if own[:, : number * rank].any() or own[:, (number + 1) * rank :].any():
                return 0
        return rank if up.any() else 0

    def _check_part(self, part: str, outputs: int) -> None:
        suffixes = self._suffixes[part]
        if foreign := sorted(suffixes - {DOWN, UP, ALPHA, MAGNITUDE}):
            found = f"{self._name(f'{part}.{foreign[0]}')} is for a part of a layer of the model"
            self._refuse(f"{found}, for which only LoRA and DoRA can be put together")
        for suffix in (DOWN, UP):
            if suffix not in suffixes:
                self._refuse(f"it lacks {part}.{suffix}")
        down, up = (self.shapes[f"{part}.{suffix}"] for suffix in (DOWN, UP))
        if len(down) < 2 or up[:2] != (outputs, down[0]):
            found = f"{part} has factors of {list(up)} and {list(down)}"
            self._refuse(f"{found}, and the layer of the base model has {outputs} outputs there", "does not fit")

    def _alpha(self, part: str, rank: int) -> float:
        name = f"{part}.{ALPHA}"
        if name not in self.stored:
            return self.alphas.get(part, float(rank))
        stored = self._read(self._name(name))
        if stored.numel() != 1:
            self._refuse(f"{self._name(name)} is {list(stored.shape)}, not one number")
        return float(stored)

    def _drop(self, keys: Iterable[str]) -> None:
        for key in keys:
            for suffix in self._suffixes.pop(key):
                del self.stored[f"{key}.{suffix}"], self.shapes[f"{key}.{suffix}"]
            self.alphas.pop(key, None)

    def _refuse_both(self, whole: str, parts: Iterable[str]) -> None:
        """Raise where the file has a layer both whole and in parts."""
        fused = next((name for name in self.stored if name.startswith(f"{whole}.")), "")
        part = next((name for key in parts for name in self.stored if name.startswith(f"{key}.")), "")
        if fused and part:
            path = self.summary.path
            raise AdapterError(f"{path} holds two adapters for one layer: {self._name(part)} and {self._name(fused)}.")

    def _refuse(self, found: str, what: str = "does not suit") -> None:
        raise AdapterError(f"{self.summary.path} {what} the base model: {found}.")

    def _name(self, own: str) -> str:
        """The name in the file of a tensor that is stored as it is."""
        stored = self.stored[own]
        return stored.names[0] if isinstance(stored, Computed) else stored

    def _sources(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(map(self._name, names))

    @cached_property
    def _read(self) -> ReadTensor:
        return open_tensors(self.summary.path)


def _block_diagonal(
    blocks: Sequence[Tensor], rows: Sequence[TensorSlice], outputs: int, factors: Sequence[float]
) -> Tensor:
    """The blocks, times factors, in their rows, each in its own columns; zero elsewhere."""
    columns = []
    for block, own, factor in zip(blocks, rows, factors, strict=True):
        # Products of 16-bit numbers would be rounded.
        exact = block.float() * factor if factor != 1 and block.dtype in _HALVES else block * factor
        column = exact.new_zeros(outputs, block.shape[1])
        column[own.start : own.stop] = exact.flatten(1)
        columns.append(column)
    return torch.cat(columns, dim=1)
