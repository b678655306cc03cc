"""Optimizers of any package, by the import path of their class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from lorakit.api import OptimizerConfig, Problem, check_import_path, hookimpl, import_class, instantiate

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lorakit.api import ParameterGroup


@frozen(kw_only=True)
class OptimizerByPathConfig(OptimizerConfig):
    """Any optimizer class of an installed package, by its import path, such as `torch.optim.RAdam`."""

    name = "package.Class"
    takes_import_path = True

    args: Mapping[str, Any] = field(factory=dict)
    """Arguments of the class, such as `{ betas = [0.9, 0.99] }`; the learning rate is `lr`."""

    def problems(self) -> Iterator[Problem]:
        """Checks that the class exists, and that no argument is set elsewhere."""
        yield from super().problems()
        yield from check_import_path(self.name)
        for key in {"lr", "params"} & self.args.keys():
            yield Problem(f"args.{key}", "is not an argument here", "set optimizer.lr" if key == "lr" else "")

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """An instance of the class. Raises ConfigError if it is no optimizer or rejects the arguments."""
        from torch.optim import Optimizer

        from lorakit.api import torch_groups

        cls = import_class(self.name, Optimizer, "optimizer")
        highest = max(group.lr for group in groups)
        return instantiate(cls, torch_groups(groups), self.args, "optimizer", lr=highest)


@hookimpl
def register_optimizers() -> list[type[OptimizerConfig]]:
    """Classes by path."""
    return [OptimizerByPathConfig]
