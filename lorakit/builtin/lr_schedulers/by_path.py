"""Learning-rate schedules of any package, by the dotted path of their class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from lorakit.api.components import LRSchedulerConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.errors import Problem
from lorakit.plugins.import_path import check_import_path, import_class, instantiate

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


@frozen(kw_only=True)
class LRSchedulerByPathConfig(LRSchedulerConfig):
    """Any schedule class of an installed package, by its dotted path, such as `torch.optim.lr_scheduler.StepLR`."""

    name = "package.Class"
    takes_import_path = True

    args: Mapping[str, Any] = field(factory=dict)
    """Arguments of the class, such as `{ step_size = 100, gamma = 0.5 }`."""

    def problems(self) -> Iterator[Problem]:
        """Says so if there is no such class."""
        yield from check_import_path(self.name)

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:  # noqa: ARG002
        """The class with its arguments; raises ConfigError where it is none, or does not take them."""
        from torch.optim.lr_scheduler import LRScheduler

        return instantiate(import_class(self.name, LRScheduler, "lr_scheduler"), optimizer, self.args, "lr_scheduler")


@hookimpl
def register_lr_schedulers() -> list[type[LRSchedulerConfig]]:
    """Classes by path."""
    return [LRSchedulerByPathConfig]
