"""A network module's adapters as a network of lorakit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from attrs import evolve
from torch import Tensor, nn

from lorakit.api import AdaptationTarget, AdapterModule, Network, derived_seed
from lorakit_network_modules.creation import Created, by_part, create

if TYPE_CHECKING:
    from lorakit_network_modules.component import NetworkModuleConfig


class ModuleAdapter(AdapterModule):
    """An adapter of a network module that replaces its layer."""

    def __init__(self, created: Created, base: nn.Module) -> None:
        super().__init__(created.key, base)
        self.module = created.module
        self.lr_factors = {f"module.{name}": factor for name, factor in created.lr_factors.items()}
        """The factor of the learning rate of each trained parameter, by its name."""
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in created.lr_factors)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output plus the update, in the dtype of the input."""
        if self.multiplier == 0:
            output: Tensor = self.base(x)
            return output
        self.module.multiplier = self.multiplier  # type: ignore[assignment]
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
            output = self.module(x)
        return output.to(x.dtype)

    def adapter_state(self) -> dict[str, Tensor]:
        """The module's tensors; the tensors in files may have other values or names."""
        return dict(nn.Module.state_dict(self.module))

    def export_state(self) -> dict[str, Tensor]:
        """The tensors that the module saves."""
        return dict(self.module.state_dict())

    def shape_mismatch(self, tensors: Mapping[str, Tensor]) -> str:
        """Reports an alpha that differs, which the module would ignore, and shapes."""
        own, other = self.adapter_state().get("alpha"), tensors.get("alpha")
        if own is not None and other is not None and not math.isclose(own.item(), other.item(), rel_tol=2**-8):
            return f"alpha {other.item():g} in the file, {own.item():g} in the config"
        return super().shape_mismatch(tensors)

    def load_adapter_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Load exact tensors as they are, and tensors of a file as the module does."""
        if tensors.keys() == self.adapter_state().keys():
            super().load_adapter_state(tensors)
        else:
            self.module.load_state_dict(dict(tensors))

    @torch.no_grad()
    def start_as(self, other: nn.Module) -> None:
        """Copy the weights of a fresh adapter."""
        for own, new in zip(self.module.parameters(), other.parameters(), strict=True):
            own.copy_(new)


class ModuleNetwork(Network):
    """All adapters that a network module makes for a model."""

    def __init__(self, config: NetworkModuleConfig, targets: Sequence[AdaptationTarget]) -> None:
        """Make the adapters. Raises `AdapterError` if the module or its arguments cannot be used."""
        self._config = config
        self._parts = by_part(targets)
        self._has_dropout = bool(config.dropout) or any("dropout" in key for key in config.args)
        adapted: list[AdaptationTarget] = []
        created: dict[str, Created] = {}
        for own in self._parts.values():
            made = create(config, own, seed=0)
            created |= made
            known = {target.path: target for target in own}
            adapted += [_target(one, known.get(one.path), own[0]) for one in made.values()]
        super().__init__(adapted, lambda target: ModuleAdapter(created[target.key], target.module))

    def initialize(self, seed: int) -> None:
        """Set the initial weights, a function of seed and part."""
        self.detach()
        for targets in self._parts.values():
            for key, fresh in create(self._config, targets, seed).items():
                adapter = self._by_key[key]
                assert isinstance(adapter, ModuleAdapter)  # noqa: S101 - for the type checker
                adapter.start_as(fresh.module)
        self.attach()

    def group_of(self, target: AdaptationTarget, parameter_name: str) -> tuple[str, float]:
        """Parameters with a learning-rate factor, as for LoRA+, are in a separate group."""
        name, factor = super().group_of(target, parameter_name)
        adapter = self._by_key[target.key]
        ratio = adapter.lr_factors[parameter_name] if isinstance(adapter, ModuleAdapter) else 1.0
        return (name, factor) if ratio == 1 else (f"{name} plus", factor * ratio)

    def begin_batch(self, sample_seeds: Tensor) -> None:
        """Seed PyTorch's generator, which the module's dropout uses, from the images' seeds."""
        if self._has_dropout:
            torch.manual_seed(derived_seed("network_module", *sample_seeds.tolist()))


def _target(created: Created, layer: AdaptationTarget | None, sibling: AdaptationTarget) -> AdaptationTarget:
    """The target of an adapter: a target of the model, or another layer of the same part as a sibling."""
    if layer is not None:
        return evolve(layer, key=created.key)
    return AdaptationTarget(created.key, sibling.part, sibling.root, created.path, encoder_index=sibling.encoder_index)
