"""LoRA networks whose ranks, alphas and learning rates are different from block to block of the U-Net.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import evolve, field, frozen
from attrs import validators as v

from lorakit.api.block_layout import BlockLayout, Side, curve
from lorakit.api.components import ModelFamilyConfig
from lorakit.errors import Problem
from lorakit.networks.config import LoRAConfig

if TYPE_CHECKING:
    from lorakit.config.train_config import TrainConfig
    from lorakit.models.interfaces import AdaptationTarget
    from lorakit.networks.lora import LRFactors
    from lorakit.networks.starting import StartingFile

LR_WEIGHTS: Mapping[Side, str] = {"down": "down_lr_weight", "mid": "mid_lr_weight", "up": "up_lr_weight"}
"""The fields with factors of learning rates, by the side of the U-Net."""


def _curve_or_numbers(_: object, __: object, value: str | tuple[float, ...] | None) -> None:
    if isinstance(value, str):
        curve(value, 2)
    elif value is not None and any(number < 0 for number in value):
        raise ValueError(f"must be numbers from 0 up, not {min(value):g}")


def per_block(validator: Any) -> Any:
    """A field for a list with one number for each block, each of which the validator checks; it may be absent."""
    each: Any = v.deep_iterable(validator)
    return field(default=None, validator=v.optional(each))


@frozen(kw_only=True)
class BlockwiseLoRAConfig(LoRAConfig):
    """A network of LoRA adapters that may be different from block to block of the U-Net."""

    size_keys: ClassVar[tuple[str, ...]] = (*LoRAConfig.size_keys, "block_ranks", "block_alphas")

    block_ranks: tuple[int, ...] | None = per_block(v.ge(0))
    """Ranks for the blocks of the U-Net instead of `rank`, 25 for Stable Diffusion; a block of rank 0 gets no
    adapters."""
    block_alphas: tuple[float, ...] | None = per_block(v.gt(0))
    """Alphas for the blocks of the U-Net instead of `alpha`, 25 for Stable Diffusion."""
    down_lr_weight: str | tuple[float, ...] | None = field(default=None, validator=_curve_or_numbers)
    """What multiplies the learning rate of the U-Net in its blocks on the way down: 12 numbers for Stable Diffusion, or
    one of `sine`, `cosine`, `linear`, `reverse_linear`, `zeros`, with, say, `+0.25` behind it."""
    mid_lr_weight: tuple[float, ...] | None = per_block(v.ge(0))
    """The same for the blocks in the middle, of which Stable Diffusion has one."""
    up_lr_weight: str | tuple[float, ...] | None = field(default=None, validator=_curve_or_numbers)
    """The same for the blocks on the way up: 12 numbers for Stable Diffusion, or one of the names."""
    block_lr_zero_threshold: float = field(default=0.0, validator=v.ge(0))
    """Blocks that multiply the learning rate by no more than this get no adapters."""

    @property
    def varies_by_block(self) -> bool:
        """Whether anything is given for single blocks of the U-Net, which may leave some without adapters."""
        return any(getattr(self, key) is not None for key in (*self._lists(), *LR_WEIGHTS.values()))

    def in_block(
        self,
        target: AdaptationTarget,
        size: tuple[int, float],
        ranks: Sequence[int] | None,
        alphas: Sequence[float] | None,
    ) -> tuple[int, float] | None:
        """Rank and alpha of a layer's adapter: those of its block, else `size`; None where the block's rank is 0."""
        rank, alpha = size
        if target.layout is not None:
            rank = rank if ranks is None else ranks[target.position]
            alpha = alpha if alphas is None else alphas[target.position]
        return (rank, alpha) if rank else None

    def adapts(self, target: AdaptationTarget) -> bool:
        """Whether a layer is of one of the `parts`, and its block's learning rate is not zero."""
        factors = self._block_factors(target.layout) if target.layout else None
        return super().adapts(target) and (factors is None or factors[target.position] > 0)

    def lr_factors(self, targets: Sequence[AdaptationTarget]) -> LRFactors:
        """Those of LoRA+, and of the blocks of the U-Net."""
        layout = next((target.layout for target in targets if target.layout), None)
        factors = self._block_factors(layout) if layout else None
        return evolve(super().lr_factors(targets), blocks=factors or ())

    def problems_with(self, config: TrainConfig) -> Iterator[Problem]:
        """Lists that are not as long as the U-Net has blocks, and learning rates that the optimizer cannot have."""
        model, optimizer = config.model, config.optimizer
        yield from super().problems_with(config)
        wrong = list(self._wrong_lists(model))
        yield from wrong
        if wrong or model.layout is None:
            return
        factors = self._block_factors(model.layout) or [1.0] * model.layout.count
        ranks = [own for key in self._lists() if key.endswith("ranks") for own in [getattr(self, key)]]
        adapted = [factor > 0 and any(own is None or own[n] for own in ranks) for n, factor in enumerate(factors)]
        if self.parts == ("unet",) and not any(adapted):
            yield Problem("parts", "is the U-Net, of which no block has both a rank and a learning rate above zero")
        if not optimizer.supports_lr_multipliers and set(factors) - {0.0, 1.0}:
            hint = "give only 0 and 1, or choose another optimizer"
            for key in filter(lambda key: getattr(self, key) is not None, LR_WEIGHTS.values()):
                yield Problem(key, f"cannot be used with {optimizer.name}, which finds one learning rate for all", hint)

    def problems_of_file(self, file: StartingFile, config: TrainConfig) -> Iterator[Problem]:
        """Other parts, other layers or other ranks than the network has."""
        from lorakit.networks.starting import problem_of_rank, problems_of_parts

        any_layers = self.rank_from_weights or self.varies_by_block
        yield from problems_of_parts(file, config, any_layers)
        for key, wide in {"rank": False, "conv_rank": True}.items() if not any_layers else ():
            if hasattr(self, key):
                yield from problem_of_rank(file, key, getattr(self, key), file.ranks(config.trained_parts, wide=wide))

    def warnings(self) -> Iterator[Problem]:
        """Settings for blocks that get no adapters, or that nothing uses."""
        yield from super().warnings()
        lists = [key for key in (*self._lists(), *LR_WEIGHTS.values()) if getattr(self, key) is not None]
        if "unet" not in self.parts:
            for key in lists:
                yield Problem(key, "has no effect, because 'unet' is not in network.parts")
        if self.block_lr_zero_threshold and not set(lists) & set(LR_WEIGHTS.values()):
            yield Problem("block_lr_zero_threshold", f"has no effect without {', '.join(LR_WEIGHTS.values())}")

    def _lists(self) -> tuple[str, ...]:
        """The fields with one number for each block of the U-Net."""
        return tuple(key for key in self.size_keys if "block" in key)

    def _wrong_lists(self, model: ModelFamilyConfig) -> Iterator[Problem]:
        layout = model.layout
        lengths = dict.fromkeys(self._lists(), layout.count if layout else 0)
        lengths |= {key: len(layout.numbers(side)) if layout else 0 for side, key in LR_WEIGHTS.items()}
        for key, length in lengths.items():
            given = getattr(self, key)
            if given is not None and layout is None:
                yield Problem(key, f"cannot be used: the blocks of {model.name} are not numbered", "leave it out")
            elif isinstance(given, tuple) and len(given) != length:
                yield Problem(key, f"must have {length} numbers for {model.name}, not {len(given)}")

    def _block_factors(self, layout: BlockLayout) -> list[float] | None:
        """What multiplies the learning rate in each block, 0 where it gets no adapters; None if nothing does."""
        given = {side: value for side, key in LR_WEIGHTS.items() if (value := getattr(self, key)) is not None}
        if not given:
            return None
        values = {
            side: curve(own, len(layout.numbers(side))) if isinstance(own, str) else own for side, own in given.items()
        }
        return [factor if factor > self.block_lr_zero_threshold else 0.0 for factor in layout.spread(values)]
