"""What components make, looked at before it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lorakit.api.components import (
    AttentionConfig,
    Component,
    LRSchedulerConfig,
    ModelFamilyConfig,
    NetworkConfig,
    ObserverConfig,
    OptimizerConfig,
    SaverConfig,
)
from lorakit.api.observer import Observer
from lorakit.errors import PluginError
from lorakit.networks.network import Network
from lorakit.plugins.failures import describe_component, plugin_errors


def _is_a(cls: type) -> Callable[[object], bool]:
    return lambda made: isinstance(made, cls)


def _can(*methods: str) -> Callable[[object], bool]:
    # Of the class, because asking a model itself for a part would read that part.
    return lambda made: all(callable(getattr(type(made), method, None)) for method in methods)


def _is_saver(made: object) -> bool:
    suffix = getattr(made, "suffix", None)
    return _can("save", "load")(made) and isinstance(suffix, str) and suffix.startswith(".")


_EXPECTED: Mapping[type[Component], tuple[str, Callable[[object], bool]]] = {
    ModelFamilyConfig: ("a DiffusionModel", _can("predict", "targets", "fingerprint", "free")),
    NetworkConfig: ("a Network", _is_a(Network)),
    OptimizerConfig: ("a torch.optim.Optimizer", _is_a(Optimizer)),
    LRSchedulerConfig: ("an LRScheduler of torch.optim.lr_scheduler", _is_a(LRScheduler)),
    AttentionConfig: ("a function", callable),
    SaverConfig: ("a Saver, with save, load and a suffix such as '.safetensors'", _is_saver),
    ObserverConfig: ("an Observer", _is_a(Observer)),
}
"""What the `build` of each kind should make, in words, and whether something is that."""


def built(component: Component, *arguments: object) -> Any:
    """What a component's `build` makes of the arguments.

    Raises PluginError where it fails or makes something else than its kind should.
    """
    with plugin_errors(component, "build"):
        made = component.build(*arguments)  # type: ignore[attr-defined]
    what, is_right = next(_EXPECTED[kind] for kind in _EXPECTED if isinstance(component, kind))
    if not is_right(made):
        found = "nothing" if made is None else f"an object of the class {type(made).__qualname__}"
        raise PluginError(f"{describe_component(component)} cannot be used: its build returned {found}, not {what}")
    return made
