"""A network module's adapters as a network of lorakit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorakit.models.protocol import AdaptationTarget
from lorakit.networks.network import AdapterModule, Network
from lorakit.randomness import derived_seed
from lorakit_network_modules.creation import Created, by_part, create

if TYPE_CHECKING:
    from lorakit_network_modules.component import NetworkModuleConfig


class ModuleAdapter(AdapterModule):
    """An adapter of a network module in the place of its layer."""

    def __init__(self, created: Created, base: nn.Module) -> None:
        super().__init__(created.key, base)
        self.module = created.module

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with what was learnt, in the input's number format."""
        if self.multiplier == 0:
            output: Tensor = self.base(x)
            return output
        self.module.multiplier = self.multiplier  # type: ignore[assignment]
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
            output = self.module(x)
        return output.to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What the module says belongs into a file."""
        return dict(self.module.state_dict())

    def misfit(self, tensors: Mapping[str, Tensor]) -> str:
        """Names alpha where it differs, as the module would go on with its own, and shapes otherwise."""
        own = self.tensors()
        if "alpha" in own and not math.isclose(own["alpha"].item(), tensors["alpha"].item(), rel_tol=2**-8):
            return f"alpha {tensors['alpha'].item():g} in the file, {own['alpha'].item():g} in the config"
        return super().misfit(tensors)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors as the module does."""
        self.module.load_state_dict(dict(tensors))

    @torch.no_grad()
    def start_as(self, other: nn.Module) -> None:
        """Take over the weights of an adapter that was just made."""
        for own, new in zip(self.module.parameters(), other.parameters(), strict=True):
            own.copy_(new)


class ModuleNetwork(Network):
    """All adapters that a network module makes for a model."""

    def __init__(self, config: NetworkModuleConfig, targets: Sequence[AdaptationTarget]) -> None:
        """Make the adapters; raises `AdapterError` where the module or its arguments cannot be used."""
        self._config = config
        self._parts = by_part(targets)
        self._has_dropout = bool(config.dropout) or any("dropout" in key for key in config.args)
        adapted: list[AdaptationTarget] = []
        created: dict[str, Created] = {}
        for part, own in self._parts.items():
            made = create(config, own, seed=0)
            created |= made
            adapted += [AdaptationTarget(key, part, own[0].block, own[0].root, one.path) for key, one in made.items()]
        super().__init__(adapted, lambda target: ModuleAdapter(created[target.key], target.module))

    def initialize(self, seed: int) -> None:
        """Set the weights that training starts from, a function of seed and part."""
        self.detach()
        for targets in self._parts.values():
            for key, fresh in create(self._config, targets, seed).items():
                adapter = self._by_key[key]
                assert isinstance(adapter, ModuleAdapter)  # noqa: S101 - for the type checker
                adapter.start_as(fresh.module)
        self.attach()

    def begin_batch(self, sample_seeds: Tensor) -> None:
        """Seed what the module draws from PyTorch's own generator, its dropouts, from the images' seeds."""
        if self._has_dropout:
            torch.manual_seed(derived_seed("network_module", *sample_seeds.tolist()))
