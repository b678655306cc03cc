"""The built-in learning-rate schedules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import field, frozen
from attrs import validators as v

from lorakit.api import (
    LRSchedulerConfig,
    Problem,
    WarmupConfig,
    check_import_path,
    check_steps,
    cosine_factor,
    hookimpl,
    import_class,
    instantiate,
    resolve_steps,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

INVERSE_SQRT_TIMESCALE = 10_000
"""Steps; the default of `inverse_sqrt` without a warm-up."""

_NUMBER = r"\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+(?:e-?\d+)?"
_STEP_RULES = re.compile(rf"(?:(?:{_NUMBER}):(?:\d+|0?\.\d+),)*(?:{_NUMBER})")


@frozen(kw_only=True)
class ConstantConfig(LRSchedulerConfig):
    """A constant learning rate; see `constant_with_warmup` for a warm-up."""

    name = "constant"
    is_constant = True

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:  # noqa: ARG002
        """A schedule that changes nothing."""
        from torch.optim.lr_scheduler import LambdaLR

        return LambdaLR(optimizer, lambda _step: 1.0)


@frozen(kw_only=True)
class ConstantWithWarmupConfig(WarmupConfig):
    """A warm-up, then a constant learning rate."""

    name = "constant_with_warmup"

    def factor(self, progress: float, lr: float) -> float:  # noqa: ARG002
        """1 throughout."""
        return 1.0


@frozen(kw_only=True)
class LinearConfig(WarmupConfig):
    """Linear decay to zero."""

    name = "linear"

    def factor(self, progress: float, lr: float) -> float:  # noqa: ARG002
        """1 − progress."""
        return 1.0 - progress


@frozen(kw_only=True)
class PolynomialConfig(WarmupConfig):
    """Polynomial decay to `lr_end`."""

    name = "polynomial"

    power: float = field(default=1.0, validator=v.gt(0))
    """Exponent of the remaining share of the run: 1 is linear, a higher one decays earlier."""
    lr_end: float = field(default=1e-7, validator=v.ge(0))
    """Learning rate at the end of the run; a parameter group whose learning rate is lower keeps it."""

    def factor(self, progress: float, lr: float) -> float:
        """(lr_end + (lr − lr_end)·(1 − progress)^power) / lr."""
        if lr <= self.lr_end:
            return 1.0
        return (self.lr_end + (lr - self.lr_end) * math.pow(1.0 - progress, self.power)) / lr


@frozen(kw_only=True)
class CosineConfig(WarmupConfig):
    """Cosine decay to zero (Loshchilov and Hutter, 2017, arXiv:1608.03983)."""

    name = "cosine"

    def factor(self, progress: float, lr: float) -> float:  # noqa: ARG002
        """½(1 + cos π·progress)."""
        return cosine_factor(progress)


@frozen(kw_only=True)
class CosineWithRestartsConfig(WarmupConfig):
    """Several cosine decays in a row, each from the full learning rate (arXiv:1608.03983)."""

    name = "cosine_with_restarts"

    num_cycles: int = field(default=1, validator=v.ge(1))
    """Number of decays in the run."""

    def factor(self, progress: float, lr: float) -> float:  # noqa: ARG002
        """½(1 + cos π·p), with p the progress within the cycle; 0 at the end of the run."""
        if progress >= 1:
            return 0.0
        return cosine_factor(self.num_cycles * progress % 1)


@frozen(kw_only=True)
class CosineWithMinLRConfig(WarmupConfig):
    """Cosine decay to a share of the learning rate."""

    name = "cosine_with_min_lr"

    min_lr_ratio: float = field(default=0.1, validator=[v.ge(0), v.le(1)])
    """Lowest learning rate, as a share of the full one."""
    num_cycles: int = field(default=1, validator=v.ge(1))
    """Number of half waves in the run: with 2, the learning rate falls and rises again."""

    def factor(self, progress: float, lr: float) -> float:  # noqa: ARG002
        """M + (1 − m)·½(1 + cos π·n·progress), where m is `min_lr_ratio` and n is `num_cycles`."""
        return cosine_factor(progress, self.num_cycles, self.min_lr_ratio)


@frozen(kw_only=True)
class InverseSqrtConfig(WarmupConfig):
    """Inverse square root decay, 1/√step, which never reaches zero (Zhai et al., 2022, arXiv:2106.04560)."""

    name = "inverse_sqrt"

    timescale: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Steps after which the learning rate is 1/√2 of the full one. Default: the length of the warm-up, or 10,000."""

    def curve(self, lr: float, warmup: int, total_steps: int) -> Callable[[int], float]:  # noqa: ARG002
        """1/√(1 + (step − warmup)/timescale)."""
        timescale = self.timescale or warmup or INVERSE_SQRT_TIMESCALE
        return lambda step: 1.0 / math.sqrt(1.0 + (step - warmup) / timescale)


@frozen(kw_only=True)
class WarmupStableDecayConfig(WarmupConfig):
    """A constant learning rate with a cosine decay at the end of the run (Hu et al., 2024, arXiv:2404.06395)."""

    name = "warmup_stable_decay"

    decay_steps: float = field(default=0.1, validator=v.ge(0))
    """Length of the decay in steps; below 1, a share of the run."""
    min_lr_ratio: float = field(default=0.0, validator=[v.ge(0), v.le(1)])
    """Lowest learning rate, as a share of the full one."""
    num_cycles: int = field(default=1, validator=v.ge(1))
    """Number of half waves in the decay: with 2, the learning rate falls and rises again."""

    def curve(self, lr: float, warmup: int, total_steps: int) -> Callable[[int], float]:  # noqa: ARG002
        """1, then m + (1 − m)·½(1 + cos π·n·progress), where m is `min_lr_ratio` and n is `num_cycles`."""
        decay = resolve_steps(self.decay_steps, total_steps)
        start = max(warmup, total_steps - decay)

        def factor(step: int) -> float:
            progress = min(1.0, max(0, step - start) / max(1, decay))
            return cosine_factor(progress, self.num_cycles, self.min_lr_ratio)

        return factor

    def problems(self) -> Iterator[Problem]:
        """Checks that warm-up and decay are whole steps or a share."""
        yield from super().problems()
        yield from check_steps("decay_steps", self.decay_steps)


@frozen(kw_only=True)
class PiecewiseConstantConfig(LRSchedulerConfig):
    """A learning rate that is constant between given steps."""

    name = "piecewise_constant"

    step_rules: str
    """Factors of the learning rate, each with the step that ends it (below 1, a share of the run), then a last factor.

    `"1:10,0.1:20,0.005"` is the full learning rate for steps 0 to 9, a tenth for 10 to 19, then 0.005 of it."""

    def levels(self, total_steps: int) -> list[tuple[int, float]]:
        """The step that ends each level, and the level's factor; the last level ends after the run."""
        *rules, last = self.step_rules.replace(" ", "").split(",")
        pairs = [rule.split(":") for rule in rules]
        levels = [(resolve_steps(float(end), total_steps), float(factor)) for factor, end in pairs]
        return [*sorted(levels), (total_steps + 1, float(last))]

    def problems(self) -> Iterator[Problem]:
        """Checks that the rules can be parsed."""
        if not _STEP_RULES.fullmatch(self.step_rules.replace(" ", "")):
            hint = 'such as "1:10,0.1:20,0.005"'
            yield Problem("step_rules", f"must be FACTOR:STEP pairs and a last FACTOR, not {self.step_rules!r}", hint)

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The schedule, the same for all parameter groups."""
        from torch.optim.lr_scheduler import LambdaLR

        levels = self.levels(total_steps)
        return LambdaLR(optimizer, lambda step: next((level for end, level in levels if step < end), levels[-1][1]))


@frozen(kw_only=True)
class LRSchedulerByPathConfig(LRSchedulerConfig):
    """Any schedule class of an installed package, by its import path, such as `torch.optim.lr_scheduler.StepLR`."""

    name = "package.Class"
    takes_import_path = True

    args: Mapping[str, Any] = field(factory=dict)
    """Arguments of the class, such as `{ step_size = 100, gamma = 0.5 }`."""

    def problems(self) -> Iterator[Problem]:
        """Checks that the class exists."""
        yield from check_import_path(self.name)

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:  # noqa: ARG002
        """An instance of the class. Raises ConfigError if it is no LR scheduler or rejects the arguments."""
        from torch.optim.lr_scheduler import LRScheduler

        return instantiate(import_class(self.name, LRScheduler, "lr_scheduler"), optimizer, self.args, "lr_scheduler")


@hookimpl
def register_lr_schedulers() -> list[type[LRSchedulerConfig]]:
    """All schedules, and classes of other packages by import path."""
    return [
        ConstantConfig, ConstantWithWarmupConfig, LinearConfig, PolynomialConfig, CosineConfig,
        CosineWithRestartsConfig, CosineWithMinLRConfig, InverseSqrtConfig, WarmupStableDecayConfig,
        PiecewiseConstantConfig, LRSchedulerByPathConfig,
    ]  # fmt: skip
