"""Which layers a network adapts, and what its groups of blocks have for themselves; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import NetworkConfig, OptimizerConfig
from lorakit.errors import Problem
from lorakit.utils.wording import listed

if TYPE_CHECKING:
    from lorakit.api.model_family import ModelFamilyConfig
    from lorakit.config.train_config import TrainConfig
    from lorakit.models.interfaces import AdaptationTarget

_EACH_GROUP = {
    "group_ranks": ("block_ranks",),
    "group_lr_weights": ("down_lr_weight", "mid_lr_weight", "up_lr_weight"),
}
"""The keys for groups of blocks, and those that say the same block by block."""


def _from_zero_up(_: object, __: object, value: Any) -> None:
    for group, number in (value or {}).items():
        if number < 0:
            raise ValueError(f"must have numbers from 0 up, not {number:g} for {group}")


@frozen(kw_only=True)
class LayerChoice(NetworkConfig):
    """A network of which the config says the kinds of layers, and ranks and learning rates of groups of blocks."""

    layers: tuple[str, ...] | None = field(default=None, validator=v.optional(v.min_len(1)))
    """Kinds of layers that get adapters, such as `["attention"]`, instead of those that the network chooses; a layer of
    several kinds gets one if any of them is listed. Which kinds there are depends on the model family."""
    group_ranks: Mapping[str, int] | None = field(default=None, validator=_from_zero_up)
    """Ranks in groups of blocks of the denoiser instead of `rank`, such as `{ down = 4, up = 16 }`; a group of rank 0
    gets no adapters."""
    group_lr_weights: Mapping[str, float] | None = field(default=None, validator=_from_zero_up)
    """Multiplies the learning rate in groups of blocks of the denoiser, such as `{ mid = 0.5 }`; a group with 0 gets no
    adapters."""

    def is_chosen(self, target: AdaptationTarget) -> bool:
        """Whether a layer is of one of the kinds in `layers`."""
        return bool(target.tags & set(self.layers or ()))

    def group_rank(self, target: AdaptationTarget) -> int | None:
        """The rank of a layer's group of blocks; None where none is given for it."""
        return (self.group_ranks or {}).get(_group_of(target))

    def group_lr_weight(self, target: AdaptationTarget) -> float:
        """What multiplies the learning rate in a layer's group of blocks."""
        return (self.group_lr_weights or {}).get(_group_of(target), 1.0)

    def wrong_choices(self, config: TrainConfig) -> Iterator[Problem]:
        """Kinds of layers and groups of blocks that the model does not have; keys are field names."""
        model, known = config.model, config.model.layer_tags
        for tag in [tag for tag in self.layers or () if tag not in known]:
            hint = f"{model.name} has {listed(known)}" if known else "leave it out"
            yield Problem("layers", f"has {tag!r}, which is no kind of layer of {model.name}", hint)
        for key, others in _EACH_GROUP.items():
            given: Mapping[str, Any] | None = getattr(self, key)
            if given is not None:
                yield from _wrong_groups(key, given, model)
                if both := [other for other in others if getattr(self, other, None) is not None]:
                    yield Problem(key, f"cannot be combined with {listed(both)}", "give either")
                optimizer = config.optimizer
                if key == "group_lr_weights" and not optimizer.supports_lr_multipliers and {*given.values()} - {0, 1}:
                    yield Problem(key, one_rate(optimizer), "give only 0 and 1, or choose another optimizer")

    def block_weights(self, model: ModelFamilyConfig) -> list[float]:
        """For each block of the denoiser, 0 if its group gets no adapters, else more."""
        if model.layout is None:
            return []
        weights = [1.0] * model.layout.count
        for given in (self.group_ranks or {}, self.group_lr_weights or {}):
            for group, weight in given.items():
                for number in model.layout.groups[group]:
                    weights[number] *= weight
        return weights


def one_rate(optimizer: OptimizerConfig) -> str:
    """Why an optimizer rules out learning rates that vary."""
    return f"cannot be used with {optimizer.name}, which finds one learning rate for all"


def _wrong_groups(key: str, given: Mapping[str, Any], model: ModelFamilyConfig) -> Iterator[Problem]:
    if model.layout is None:
        yield Problem(key, f"cannot be used: the blocks of {model.name} are not numbered", "leave it out")
        return
    for group in given.keys() - model.layout.groups.keys():
        hint = f"{model.name} has {listed(tuple(model.layout.groups))}"
        yield Problem(key, f"has {group!r}, which is no group of blocks of {model.name}", hint)


def _group_of(target: AdaptationTarget) -> str:
    """The group of a layer's block; empty where its blocks are not numbered."""
    return "" if target.layout is None or target.block_index is None else target.layout.group_of(target.block_index)
