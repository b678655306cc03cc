"""Optimizers of any package, by the dotted path of their class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from lorakit.api.components import OptimizerConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.errors import Problem
from lorakit.plugins.import_path import check_import_path, import_class, instantiate

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lorakit.networks.network import ParameterGroup


@frozen(kw_only=True)
class OptimizerByPathConfig(OptimizerConfig):
    """Any optimizer class of an installed package, by its dotted path, such as `torch.optim.RAdam`."""

    name = "package.Class"
    takes_import_path = True

    args: Mapping[str, Any] = field(factory=dict)
    """Arguments of the class, such as `{ betas = [0.9, 0.99] }`; the learning rate is `lr`."""

    def problems(self) -> Iterator[Problem]:
        """Says so if there is no such class, or if arguments are given that are set elsewhere."""
        yield from super().problems()
        yield from check_import_path(self.name)
        for key in {"lr", "params"} & self.args.keys():
            yield Problem(f"args.{key}", "cannot be given here", "see optimizer.lr" if key == "lr" else "")

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """The class with its arguments; raises ConfigError where it is none, or does not take them."""
        from torch.optim import Optimizer

        from lorakit.networks.network import torch_groups

        cls = import_class(self.name, Optimizer, "optimizer")
        highest = max(group.lr for group in groups)
        return instantiate(cls, torch_groups(groups), self.args, "optimizer", lr=highest)


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """Classes by path."""
    return [OptimizerByPathConfig]
