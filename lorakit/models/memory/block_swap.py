"""Frozen weights that stay in the host's memory and are copied to the device ahead of their use.

Layers that are used one after the other make up a group, whose weights lie in one piece of host memory. The device has
room for two groups: the one in use, and the one that is copied meanwhile, on a stream of its own, because it was next
the last time. The host never waits: streams wait for each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from lorakit.models.memory.layers import is_adaptable
from lorakit.models.memory.quantization import QuantizedLayer, convert_layer
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
    """What some layers keep of their weights, in one piece of the host's memory."""

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
        """The piece of memory, uint8 [bytes]."""
        for layer, views in zip(layers, self.views(self.host), strict=True):
            for name, view in views.items():
                view.copy_(layer.get_buffer(name))
                delattr(layer, name)

    def views(self, memory: Tensor) -> list[dict[str, Tensor]]:
        """The tensors of each layer, by name, in a piece of memory laid out as the group's own."""
        return [{name: span.view(memory) for name, span in spans.items()} for spans in self._spans]


@define(eq=False)
class _Place:
    """Room for one group on the device."""

    memory: Tensor
    """uint8 [bytes]."""
    group: Group | None = None
    """What is in it, or on its way."""
    arrived: torch.Event | None = None
    """When that is there; None where copies are waited for."""
    views: dict[Group, list[dict[str, Tensor]]] = field(factory=dict)
    """The tensors of each group that has been in it."""


class BlockSwapper:
    """Brings groups of weights to the device, each ahead of its use where it was foreseen.

    It is for one stream of work; what it brings may be overwritten as soon as another group is asked for, as seen from
    that stream.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        """Two places on the device, or one for a single group, each as large as the largest group."""
        size = max(group.host.nbytes for group in groups)
        memory = (torch.empty(size, dtype=torch.uint8, device=device) for _ in groups[:2])
        self._places = [_Place(own) for own in memory]
        self._device = device
        self._stream = torch.Stream(device) if device.type in _WITH_STREAMS else None
        self._current: Group | None = None
        self._before: Group | None = None
        self._next: dict[tuple[Group | None, Group | None], Group] = {}
        """What came after two groups the last time: two, as on the way back each is followed by another one."""
        if self._stream is not None:
            for place in self._places:
                # Memory that is given back while a copy into it is under way must not be given out before its end.
                place.memory.record_stream(self._stream)

    def bring(self, group: Group) -> list[dict[str, Tensor]]:
        """What each layer of a group keeps of its weight, by name, on the device."""
        if group is not self._current:
            self._turn_to(group)
        (place,) = (own for own in self._places if own.group is group)
        if group not in place.views:
            place.views[group] = group.views(place.memory)
        return place.views[group]

    def _turn_to(self, group: Group) -> None:
        """Make a group the one in use, and send for the one that is likely to be next."""
        self._next[self._before, self._current] = group
        self._before, self._current = self._current, group
        place = self._sent_for(group)
        if place.arrived is not None:
            torch.accelerator.current_stream(self._device).wait_event(place.arrived)
        following = self._next.get((self._before, group))
        if following is not None:
            self._sent_for(following)

    def _sent_for(self, group: Group) -> _Place:
        """The place where a group is, or where it will be: that of one that is needed less."""
        for place in self._places:
            if place.group is group:
                return place
        importance: dict[Group | None, int] = {self._before: 1, self._current: 2}
        place = min(self._places, key=lambda own: importance.get(own.group, 0))
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
    """Where a layer finds what is kept of its weight."""

    conveyor: BlockSwapper
    group: Group
    number: int

    def __call__(self) -> Mapping[str, Tensor]:
        return self.conveyor.bring(self.group)[self.number]


def stream(groups: Iterable[Sequence[nn.Module]], device: torch.device) -> None:
    """Let layers keep their weights in the host's memory, and compute on a device.

    Each group is of layers that are used one after the other. Layers that are neither linear nor plain convolutions,
    and those that do so already, stay as they are.
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
    conveyor = BlockSwapper([group for group, _ in kept], device)
    for group, own in kept:
        for number, layer in enumerate(own):
            layer.source = _Source(conveyor, group, number)


def streamed_bytes(layers: Iterable[nn.Module]) -> int:
    """Bytes of the host's memory that hold weights of these layers' groups."""
    sources = (layer.source for layer in layers if isinstance(layer, QuantizedLayer))
    return sum(group.host.nbytes for group in {source.group for source in sources if isinstance(source, _Source)})
