"""Block swap: frozen weights stay in CPU RAM and are copied to the device ahead of their use.

Layers that are used one after the other form a group, whose weights are contiguous in CPU RAM. The device has slots for
two groups: the one in use, and the one that was next the last time, which is copied meanwhile on a separate stream. The
host never waits: streams wait for each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from lorakit.models.memory.quantization import QuantizedLayer, convert_layer, is_adaptable
from lorakit.models.memory.weight_formats import Unquantized

_ALIGNMENT = 256
"""Bytes; kernels read tensors fastest that begin at a multiple of it."""
_WITH_STREAMS = ("cuda", "xpu")
"""Devices that copy from pinned memory while they compute."""


@frozen
class _Span:
    """A tensor in a piece of memory."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, memory: Tensor) -> Tensor:
        """The tensor, a view of the piece, uint8 [bytes]."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return memory[self.start : self.start + size].view(self.dtype).view(self.shape)


class Group:
    """The stored weights of some layers, contiguous in CPU RAM."""

    def __init__(self, layers: Sequence[QuantizedLayer], device: torch.device) -> None:
        """Take the weights out of the layers, to be copied to that device."""
        self._spans: list[dict[str, _Span]] = []
        size = 0
        for layer in layers:
            spans = {}
            for name, tensor in layer.named_buffers(recurse=False):
                spans[name] = _Span(size, tensor.shape, tensor.dtype)
                size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            self._spans.append(spans)
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type in _WITH_STREAMS)
        """The memory, uint8 [bytes]."""
        for layer, views in zip(layers, self.views(self.host), strict=True):
            for name, view in views.items():
                view.copy_(layer.get_buffer(name))
                delattr(layer, name)

    def views(self, memory: Tensor) -> list[dict[str, Tensor]]:
        """The tensors of each layer, by name, in memory laid out as the group's."""
        return [{name: span.view(memory) for name, span in spans.items()} for spans in self._spans]


@define(eq=False)
class _Slot:
    """Memory for one group on the device."""

    memory: Tensor
    """uint8 [bytes]."""
    group: Group | None = None
    """The group that is in it or is being copied to it."""
    arrived: torch.Event | None = None
    """When the copy is done; None where copies are synchronous."""
    views: dict[Group, list[dict[str, Tensor]]] = field(factory=dict)
    """The tensors of each group that has been in it."""


class BlockSwapper:
    """Copies groups of weights to the device, ahead of their use where the order is known.

    It is for one stream of work; a group may be overwritten as soon as another one is fetched, as seen from that
    stream.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        """Two slots on the device, or one for a single group, each as large as the largest group."""
        size = max(group.host.nbytes for group in groups)
        memory = (torch.empty(size, dtype=torch.uint8, device=device) for _ in groups[:2])
        self._slots = [_Slot(own) for own in memory]
        self._device = device
        self._stream = torch.Stream(device) if device.type in _WITH_STREAMS else None
        self._current: Group | None = None
        self._before: Group | None = None
        self._next: dict[tuple[Group | None, Group | None], Group] = {}
        """What came after two groups the last time: two, as on the way back each is followed by another one."""
        if self._stream is not None:
            for place in self._slots:
                # Memory that is given back while a copy into it is under way must not be given out before its end.
                place.memory.record_stream(self._stream)

    def fetch(self, group: Group) -> list[dict[str, Tensor]]:
        """The stored tensors of each layer of a group, by name, on the device."""
        if group is not self._current:
            self._next[self._before, self._current] = group
            self._before, self._current = self._current, group
            arrived = self._prefetch(group).arrived
            if arrived is not None:
                torch.accelerator.current_stream(self._device).wait_event(arrived)
            following = self._next.get((self._before, group))
            if following is not None:
                self._prefetch(following)  # it is likely to be next again
        (place,) = (own for own in self._slots if own.group is group)
        if group not in place.views:
            place.views[group] = group.views(place.memory)
        return place.views[group]

    def _prefetch(self, group: Group) -> _Slot:
        """The slot of a group; if it has none, it is copied to that of the group that is needed least."""
        for place in self._slots:
            if place.group is group:
                return place
        importance: dict[Group | None, int] = {self._before: 1, self._current: 2}
        place = min(self._slots, key=lambda own: importance.get(own.group, 0))
        place.group = group
        target = place.memory[: group.host.nbytes]
        if self._stream is None:
            target.copy_(group.host)
            return place
        # All work that reads what was in the place is asked for by now.
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            target.copy_(group.host, non_blocking=True)
        place.arrived = self._stream.record_event()
        return place


@frozen
class _Source:
    """Where a layer finds its stored weight."""

    swapper: BlockSwapper
    group: Group
    number: int

    def __call__(self) -> Mapping[str, Tensor]:
        return self.swapper.fetch(self.group)[self.number]


def stream(groups: Iterable[Sequence[nn.Module]], device: torch.device) -> None:
    """Keep the weights of layers in CPU RAM and swap them to the device, group by group.

    The layers of a group are used one after the other. Those that are not adaptable, and those that are swapped
    already, stay as they are.
    """
    kept: list[tuple[Group, list[QuantizedLayer]]] = []
    for layers in groups:
        for layer in layers:
            if is_adaptable(layer):
                convert_layer(layer, Unquantized(), layer.weight.device)
        own = [layer for layer in layers if isinstance(layer, QuantizedLayer) and layer.source is None]
        if own:
            kept.append((Group(own, device), own))
    if not kept:
        return
    swapper = BlockSwapper([group for group, _ in kept], device)
    for group, own in kept:
        for number, layer in enumerate(own):
            layer.source = _Source(swapper, group, number)


def streamed_bytes(layers: Iterable[nn.Module]) -> int:
    """Bytes of CPU RAM that hold weights of these layers' groups."""
    sources = (layer.source for layer in layers if isinstance(layer, QuantizedLayer))
    return sum(group.host.nbytes for group in {source.group for source in sources if isinstance(source, _Source)})
