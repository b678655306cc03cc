"""The network `network_module`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import field, frozen
from attrs import validators as v

from lorakit.api import NetworkConfig, Problem, check_import_path, hookimpl, network_args

if TYPE_CHECKING:
    from lorakit.api import AdaptationTarget, Network


@frozen(kw_only=True)
class NetworkModuleConfig(NetworkConfig):
    """A Python module with a function `create_network`, like --network_module of sd-scripts: `lycoris.kohya`.

    The module is executed, so use only code that you trust.
    """

    name = "package.module"
    takes_import_path = True

    rank: int = field(default=4, validator=v.ge(1))
    """Rank of the updates, if the algorithm has one."""
    alpha: float = field(default=1.0, validator=v.gt(0))
    """Strength of the updates: most algorithms multiply them by alpha / rank."""
    dropout: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    """Probability of dropping each activation inside the updates during training."""
    args: Mapping[str, Any] = field(factory=dict)
    """Arguments of the module, --network_args of sd-scripts: `{ algo = "loha", conv_dim = 8 }`."""

    def problems(self) -> Iterator[Problem]:
        """Checks that the module exists."""
        yield from check_import_path(self.name)

    def metadata(self) -> Mapping[str, object]:
        """The metadata that sd-scripts writes for the module and its arguments."""
        return {
            "ss_network_module": self.name,
            "ss_network_dim": self.rank,
            "ss_network_alpha": self.alpha,
            "ss_network_dropout": self.dropout,
            **network_args(self.args),
        }

    def build(self, targets: Sequence[AdaptationTarget]) -> Network:
        """The module's adapters, attached."""
        from lorakit_network_modules.network import ModuleNetwork

        return ModuleNetwork(self, [target for target in targets if self.adapts(target)]).attach()


@hookimpl
def register_networks() -> list[type[NetworkConfig]]:
    """Network modules."""
    return [NetworkModuleConfig]
