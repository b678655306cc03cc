"""The learning-rate schedule `cosine_with_restarts`."""

from __future__ import annotations

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import LRSchedulerConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.lr_schedules import WarmupConfig, cosine_factor


@frozen(kw_only=True)
class CosineWithRestartsConfig(WarmupConfig):
    """Several cosine decays one after another, each from the full learning rate (arXiv:1608.03983)."""

    name = "cosine_with_restarts"

    num_cycles: int = field(default=1, validator=v.ge(1))
    """How many decays the run consists of."""

    def factor(self, progress: float, lr: float) -> float:  # noqa: ARG002
        """½(1 + cos π·p), with p the progress within the cycle; 0 at the end of the run."""
        if progress >= 1:
            return 0.0
        return cosine_factor(self.num_cycles * progress % 1)


@hookimpl
def register_lr_schedulers() -> list[type[LRSchedulerConfig]]:
    """Cosine decay with restarts."""
    return [CosineWithRestartsConfig]
