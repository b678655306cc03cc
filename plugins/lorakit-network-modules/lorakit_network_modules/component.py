"""The network `network_module`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import field, frozen
from attrs import validators as v

from lorakit import hookimpl
from lorakit.api.components import NetworkConfig
from lorakit.api.network_metadata import network_args
from lorakit.errors import Problem
from lorakit.plugins.import_path import check_import_path

if TYPE_CHECKING:
    from lorakit.models.interfaces import AdaptationTarget
    from lorakit.networks.network import Network


@frozen(kw_only=True)
class NetworkModuleConfig(NetworkConfig):
    """Any Python module with a function `create_network`, as sd-scripts takes for --network_module: `lycoris.kohya`.

    It is run as code, so take it from where you trust it.
    """

    name = "package.module"
    takes_import_path = True

    rank: int = field(default=4, validator=v.ge(1))
    """Rank of the updates, where the module's algorithm has one."""
    alpha: float = field(default=1.0, validator=v.gt(0))
    """Strength of the updates: most algorithms multiply them by alpha / rank."""
    dropout: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    """Share of the numbers inside the updates that are dropped at random while training."""
    args: Mapping[str, Any] = field(factory=dict)
    """The module's own arguments, --network_args of sd-scripts: `{ algo = "loha", conv_dim = 8 }`."""

    def problems(self) -> Iterator[Problem]:
        """Says so if there is no such module."""
        yield from check_import_path(self.name)

    def metadata(self) -> Mapping[str, object]:
        """The module and its arguments, as sd-scripts has them."""
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
