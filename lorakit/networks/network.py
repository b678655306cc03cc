"""Adapters that replace layers of a base model, and the network of all of them.

Another algorithm than LoRA is a subclass of `AdapterModule` with `initialize`, `forward` and
`tensors`, and a network config whose `build` returns `Network(targets, make).attach()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from attrs import frozen
from torch import Tensor, nn

from lorakit.checkpoints.lora_files import bare_shape
from lorakit.errors import AdapterError
from lorakit.models.interfaces import AdaptationTarget
from lorakit.utils.wording import some

if TYPE_CHECKING:
    from lorakit.networks.flat_parameters import FlatParameters


@frozen
class ParameterGroup:
    """Parameters that share a learning rate."""

    name: str
    """What logs call it: `unet`, `unet_block4`, `text_encoder plus`."""
    part: str
    """Name of the part of the model that it adapts: `unet`."""
    parameters: tuple[nn.Parameter, ...]
    """The parameters, float32."""
    lr: float
    """Learning rate before the schedule."""


def torch_groups(groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    """The groups as `torch.optim` wants them; each keeps its name under `name`."""
    return [{"params": list(group.parameters), "lr": group.lr, "name": group.name} for group in groups]


class AdapterModule(nn.Module):
    """One adapter: replaces a layer of the base model and holds that layer, frozen.

    Its parameters stay float32 whatever dtype the model around it is converted to.
    """

    derivable: ClassVar[frozenset[str]] = frozenset()
    """Suffixes of tensors that a file may lack, as `load_adapter_state` finds them from the others."""

    def __init__(self, key: str, base: nn.Module) -> None:
        super().__init__()
        self.key = key
        self.base = base.requires_grad_(False)
        self.multiplier = 1.0

    def initialize(self, seed: int) -> None:
        """Set the weights that training starts from: a function of the seed and the key alone, with no effect yet."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output plus `multiplier` times the update; with 0 the base's output, bit for bit."""
        raise NotImplementedError

    def use_flat(self, flat: FlatParameters) -> None:
        """Called before training, when trained parameters have become views of flat buffers.

        An adapter may compute with `flat.view(parameter).weight`, its parameter in the model's format, and add to
        `flat.view(parameter).gradient` instead of leaving that to autograd. Here neither is done.
        """

    def adapter_state(self) -> dict[str, Tensor]:
        """The exact state by suffix as in a file, `lora_down.weight`; trained parameters themselves, not copies."""
        raise NotImplementedError

    def export_state(self) -> dict[str, Tensor]:
        """What a LoRA file holds: `adapter_state`, or equivalent tensors that more tools understand."""
        return self.adapter_state()

    def shape_mismatch(self, tensors: Mapping[str, Tensor]) -> str:
        """Why these tensors (by suffix, all but `derivable` ones there) cannot be loaded; empty if they can."""
        held = self.adapter_state()
        for suffix, own in (held if held.keys() == tensors.keys() else self.export_state()).items():
            if suffix in tensors and tensors[suffix].shape != own.shape:
                return f"{suffix} is {list(tensors[suffix].shape)} in the file, {list(own.shape)} in the network"
        return ""

    @torch.no_grad()
    def load_adapter_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Load tensors, by suffix, that have no `shape_mismatch`."""
        for suffix, own in self.adapter_state().items():
            own.copy_(tensors[suffix])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        for child in self.children() if recurse else ():
            child._apply(fn if child is self.base else move)  # type: ignore[no-untyped-call]
        super()._apply(move, recurse=False)  # type: ignore[no-untyped-call]
        return self


class Network(nn.Module):
    """All adapters of a base model."""

    adapters: nn.ModuleList

    def __init__(
        self, targets: Sequence[AdaptationTarget], make: Callable[[AdaptationTarget], AdapterModule | None]
    ) -> None:
        """Make the adapters; `make` returns None for a layer that gets none.

        Those of layers that the model does not read are frozen: no gradient would reach them, and weight decay alone
        would change them. Raises `AdapterError` if no adapter is left to train.
        """
        super().__init__()
        pairs = [(target, adapter) for target in targets if (adapter := make(target)) is not None]
        if not pairs:
            raise AdapterError(
                "The network adapts no layer of this model: check network.name, network.parts and network.layers,"
                " and what sets ranks."
            )
        if not any(target.is_read for target, _ in pairs):
            raise AdapterError(
                "The network adapts only layers that the model does not read, such as those behind model.clip_skip:"
                " check network.parts, and what sets ranks."
            )
        for target, adapter in pairs:
            if not target.is_read:
                adapter.requires_grad_(requires_grad=False)
        self._targets = [target for target, _ in pairs]
        self.adapters = nn.ModuleList(adapter for _, adapter in pairs)
        self._by_key: dict[str, AdapterModule] = {adapter.key: adapter for _, adapter in pairs}
        if len(self._by_key) < len(pairs):
            raise ValueError("two layers of the model have the same key")
        self._multiplier = 1.0

    def attach(self) -> Self:
        """Replace the layers by their adapters."""
        for target, adapter in zip(self._targets, self._by_key.values(), strict=True):
            target.replace(adapter)
        return self

    def detach(self) -> None:
        """Restore the base model's layers."""
        for target, adapter in zip(self._targets, self._by_key.values(), strict=True):
            target.replace(adapter.base)

    def initialize(self, seed: int) -> None:
        """Set the weights that training starts from, a function of the seed."""
        for adapter in self._by_key.values():
            adapter.initialize(seed)

    def use_flat(self, flat: FlatParameters) -> None:
        """Let adapters compute with flat buffers that hold all trained parameters."""
        for adapter in self._by_key.values():
            adapter.use_flat(flat)

    def begin_batch(self, sample_seeds: Tensor) -> None:
        """Called before a micro-batch of B images with their seeds, int64 [B], from which all randomness follows."""

    def on_optimizer_step(self) -> Mapping[str, Tensor]:
        """Called after each optimizer step; returns values for logs by curve name, scalars on the device.

        Must not wait for the device. A name is `norm/avg_key_norm`.
        """
        return {}

    @property
    def multiplier(self) -> float:
        """How strongly the adapters act: 1 as trained, 0 not at all."""
        return self._multiplier

    @multiplier.setter
    def multiplier(self, multiplier: float) -> None:
        self._multiplier = multiplier
        for adapter in self._by_key.values():
            adapter.multiplier = multiplier

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that have adapters, in the order of the targets."""
        return tuple(dict.fromkeys(target.part for target in self._targets))

    @property
    def targets(self) -> tuple[AdaptationTarget, ...]:
        """The layers that have adapters."""
        return tuple(self._targets)

    def parameters_of(self, part: str) -> tuple[nn.Parameter, ...]:
        """The trained parameters of one part of the model."""
        adapters = zip(self._targets, self._by_key.values(), strict=True)
        return tuple(p for target, a in adapters if target.part == part for p in a.parameters() if p.requires_grad)

    def parameter_groups(self, lr_for: Callable[[AdaptationTarget], float]) -> list[ParameterGroup]:
        """The trained parameters, grouped by learning rate; `lr_for` gives that of a layer's adapter."""
        groups: dict[tuple[str, str, float], list[nn.Parameter]] = {}
        for target, adapter in zip(self._targets, self._by_key.values(), strict=True):
            for parameter_name, parameter in adapter.named_parameters():
                if parameter.requires_grad:
                    name, factor = self.group_of(target, parameter_name)
                    groups.setdefault((name, target.part, factor * lr_for(target)), []).append(parameter)
        return [ParameterGroup(name, part, tuple(own), lr) for (name, part, lr), own in groups.items()]

    def group_of(self, target: AdaptationTarget, parameter_name: str) -> tuple[str, float]:  # noqa: ARG002
        """The parameter group of one of an adapter's parameters, and what multiplies the learning rate of its part.

        Here there is one group for each part of the model, and each text encoder where there are several.
        """
        encoders = {other.encoder_index for other in self._targets if other.part == target.part}
        number = target.encoder_index
        return f"{target.part}_{number + 1}" if number is not None and len(encoders) > 1 else target.part, 1.0

    def adapter_state(self) -> dict[str, Tensor]:
        """The exact state by key: float32 copies on the CPU."""
        return _copies({key: adapter.adapter_state() for key, adapter in self._by_key.items()})

    def export_state(self) -> dict[str, Tensor]:
        """What a LoRA file holds, by key: float32 copies on the CPU."""
        return _copies({key: adapter.export_state() for key, adapter in self._by_key.items()})

    def check_adapter_state(self, tensors: Mapping[str, Tensor], origin: str = "The LoRA file") -> None:
        """Raise `AdapterError` unless `load_adapter_state` would load these tensors; nothing is changed.

        Works also on layers without memory, of PyTorch's device `meta`.
        """
        self._fitting(tensors, origin)

    def load_adapter_state(self, tensors: Mapping[str, Tensor], origin: str = "The LoRA file") -> None:
        """Load what `adapter_state` or `export_state` returned; `origin` is what error messages call the file.

        Sides of 1 at the end of a shape count for nothing, so that factors of 1×1 convolutions fit linear layers and
        the reverse. Raises `AdapterError`, before anything is changed, unless all fit and none is missing or left over.
        """
        for key, own in self._fitting(tensors, origin).items():
            self._by_key[key].load_adapter_state(own)

    def _fitting(self, tensors: Mapping[str, Tensor], origin: str) -> dict[str, dict[str, Tensor]]:
        """The tensors by adapter and suffix, in the adapters' shapes. Raises `AdapterError` unless all fit."""
        derivable = {f"{key}.{suffix}" for key, adapter in self._by_key.items() for suffix in adapter.derivable}
        held = {f"{key}.{suffix}" for key, adapter in self._by_key.items() for suffix in adapter.adapter_state()}
        expected = {f"{key}.{suffix}" for key, adapter in self._by_key.items() for suffix in adapter.export_state()}
        if tensors.keys() | derivable not in (held | derivable, expected | derivable):
            missing, unexpected = sorted(expected - derivable - tensors.keys()), sorted(tensors.keys() - expected)
            raise AdapterError(
                f"{origin} is not of this network.{_some('Missing', missing)}{_some('Unexpected', unexpected)}"
                " Set network.name, network.parts and network.dora, and ranks and learning rates of blocks, as the file"
                " was trained, on the same kind of base model; or set network.rank_from_weights = true, which adapts"
                " the layers that the file adapts."
            )
        states = {key: adapter.adapter_state() for key, adapter in self._by_key.items()}
        by_adapter: dict[str, dict[str, Tensor]] = {key: {} for key in self._by_key}
        for name, tensor in tensors.items():
            key, _, suffix = name.partition(".")
            shape = states[key][suffix].shape if suffix in states[key] else tensor.shape
            is_same = bare_shape(tensor.shape) == bare_shape(shape)
            by_adapter[key][suffix] = tensor.reshape(shape) if is_same else tensor
        reasons = {key: adapter.shape_mismatch(by_adapter[key]) for key, adapter in self._by_key.items()}
        if mismatches := [f"{key}: {reason}" for key, reason in reasons.items() if reason]:
            raise AdapterError(
                f"{origin} does not fit this network.{_some('Mismatches', mismatches)}"
                " Set the [network] options as the file was trained."
            )
        return by_adapter


def _copies(by_adapter: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{key}.{suffix}": tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for key, own in by_adapter.items()
        for suffix, tensor in own.items()
    }


def _some(what: str, names: Sequence[str]) -> str:
    """A sentence that lists at most three of the names; empty if there are none."""
    return f" {what}: {some(names, more=' and {} more', separator='; ')}." if names else ""
