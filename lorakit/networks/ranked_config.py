"""What networks of adapters with a rank have in common as components; imports no torch."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field, fields, frozen
from attrs import validators as v

from lorakit.api.block_layout import BlockLayout, curve
from lorakit.api.model_family import ModelFamilyConfig
from lorakit.api.network_metadata import LORA_MODULE, NETWORK_ARG_KEYS, network_args
from lorakit.errors import AdapterError, ModelError, Problem
from lorakit.networks.layer_choice import LayerChoice, one_rate

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.config.train_config import TrainConfig
    from lorakit.models.interfaces import AdaptationTarget
    from lorakit.networks.network import Network
    from lorakit.networks.ranked import RankedModule
    from lorakit.networks.starting import StartingFile

_LARGEST_USUAL_RANK = 512
_SMALLEST_USUAL_SCALE = 128  # alpha 1 with rank 128 is much used

LR_WEIGHTS: Mapping[str, str] = {"down": "down_lr_weight", "mid": "mid_lr_weight", "up": "up_lr_weight"}
"""The fields with factors of learning rates, by the group of the model's `BlockLayout` that they are for."""

RankAlphas = tuple[int, float, float]
"""Rank of an adapter, its alpha, and the alpha that files hold for it."""
_SizeOf = Callable[["AdaptationTarget"], tuple[RankAlphas, Mapping[str, "Tensor"]] | None]
"""Gives the size of a layer's adapter, with its tensors in the file that the size is from; None for no adapter."""


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
class RankedConfig(LayerChoice):
    """A network of adapters with a rank; a subclass says which layers get one, of which kind and which rank."""

    algorithms: ClassVar[frozenset[str]] = frozenset()
    """The kinds of adapters in files that it can start from, as messages call them: `LoHa`."""
    network_module: ClassVar[str] = LORA_MODULE
    """Whose name files bear as `ss_network_module`, by which tools know their network."""

    size_keys: ClassVar[tuple[str, ...]] = (
        "rank", "alpha", "rank_stabilized", "block_ranks", "block_alphas", "layers", "group_ranks",
    )  # fmt: skip
    """The fields that have no effect when ranks and alphas are those of a file."""

    rank: int = field(default=4, validator=v.ge(1))
    """Rank of the updates: a higher one trains more detail and makes a larger file. 4 to 128 are usual."""
    alpha: float = field(default=1.0, validator=v.gt(0))
    """Scale of the update, which is multiplied by alpha / rank; a higher alpha acts like a higher learning rate.
    Usually from 1 to the rank."""
    rank_stabilized: bool = False
    """Multiply the updates by alpha / √rank instead, so that high ranks train as fast as low ones (Kalajdzievski, 2023,
    arXiv:2312.03732). Saved files mean the same to all tools."""
    rank_from_weights: bool = False
    """Take ranks and alphas from the file given as `weights`; layers that are not in it get no adapter."""
    module_dropout: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    """Probability of leaving out each adapter, for each image, in training."""
    block_ranks: tuple[int, ...] | None = per_block(v.ge(0))
    """One rank for each block of the denoiser instead of `rank`, 25 for Stable Diffusion; a block of rank 0 gets no
    adapters."""
    block_alphas: tuple[float, ...] | None = per_block(v.gt(0))
    """One alpha for each block of the denoiser instead of `alpha`, 25 for Stable Diffusion."""
    down_lr_weight: str | tuple[float, ...] | None = field(default=None, validator=_curve_or_numbers)
    """Multiplies the learning rate in each down block of the U-Net: 12 numbers for Stable Diffusion, or one of `sine`,
    `cosine`, `linear`, `reverse_linear`, `zeros`, optionally followed by, say, `+0.25`."""
    mid_lr_weight: tuple[float, ...] | None = per_block(v.ge(0))
    """The same for the middle blocks, of which Stable Diffusion has one."""
    up_lr_weight: str | tuple[float, ...] | None = field(default=None, validator=_curve_or_numbers)
    """The same for the up blocks: 12 numbers for Stable Diffusion, or one of the names."""
    block_lr_zero_threshold: float = field(default=0.0, validator=v.ge(0))
    """Blocks whose factor is not above this get no adapters."""

    @property
    def selects_layers(self) -> bool:
        """Whether some of the layers that the network adapts by default may get no adapter, or others get one."""
        return bool(self._block_keys()) or any((self.layers, self.group_ranks, self.group_lr_weights))

    def rank_and_alpha(self, target: AdaptationTarget) -> tuple[int, float] | None:
        """Rank and alpha of the adapter that a layer gets, or None if it gets none.

        Where `block_ranks` or `block_alphas` are given, they replace what is returned here.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say which layers it adapts")

    def file_alpha(self, target: AdaptationTarget) -> float:  # noqa: ARG002
        """The alpha that files hold for a layer: one for all, as some tools take the most common one for all."""
        return self.alpha

    def metadata(self) -> Mapping[str, object]:
        """The network as sd-scripts has it, with what is not at its default as arguments."""
        return {
            "ss_network_module": self.network_module,
            "ss_network_dim": "Dynamic" if self.rank_from_weights else self.rank,
            "ss_network_alpha": "Dynamic" if self.rank_from_weights else self.alpha,
            "ss_network_dropout": getattr(self, "dropout", 0.0),
            "ss_scale_weight_norms": getattr(self, "scale_weight_norms", None),
            **network_args(self.module_args()),
        }

    def module_args(self) -> Mapping[str, object]:
        """The arguments that the network module takes, by the names that it has for them; no value is the default."""
        options = {option.name: getattr(self, option.name) for option in fields(type(self))}
        return {name: options.get(key) for name, key in NETWORK_ARG_KEYS.items()} | {
            key: ",".join(f"{group}={value:g}" for group, value in given.items())
            for key in ("group_ranks", "group_lr_weights")
            if (given := options.get(key))
        }

    def make_adapter(self, target: AdaptationTarget, size: RankAlphas, tensors: Mapping[str, Tensor]) -> RankedModule:
        """The adapter of a layer; `tensors` are those of the file with `rank_from_weights`, by suffix, else empty."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its adapters are")

    def make_network(
        self,
        targets: Sequence[AdaptationTarget],
        make: Callable[[AdaptationTarget], RankedModule | None],
        blocks: Sequence[float],
    ) -> Network:
        """The network of the adapters; `blocks` multiply the learning rates of the denoiser's, if there are any."""
        from lorakit.networks.dropout import DropoutRates
        from lorakit.networks.ranked import LRFactors, RankedNetwork

        lr_factors = LRFactors(blocks=blocks, groups=self.group_lr_weights or {})
        return RankedNetwork(targets, make, DropoutRates(module=self.module_dropout), lr_factors)

    def build(self, targets: Sequence[AdaptationTarget]) -> Network:
        """The adapters, attached; all are of the given parts."""
        if not self.rank_from_weights:
            return self._attached(targets, self._size)
        if self.weights is None:
            raise ValueError("rank_from_weights needs weights")
        from lorakit.networks.adapter_file import load_initial_weights

        return self.build_like(load_initial_weights(self.weights, targets), targets)

    def build_like(self, tensors: Mapping[str, Tensor], targets: Sequence[AdaptationTarget]) -> Network:
        """Adapters of the ranks and alphas in a file's tensors, attached; the values in it are not loaded."""
        return self._attached(targets, _sizes_in(tensors))

    def _attached(self, targets: Sequence[AdaptationTarget], size_of: _SizeOf) -> Network:
        layout = next((target.layout for target in targets if target.layout), None)
        factors = self._block_factors(layout) if layout else None

        def make(target: AdaptationTarget) -> RankedModule | None:
            block = target.block_index
            if not self.adapts(target) or not self.group_lr_weight(target):
                return None
            if factors and block is not None and not factors[block]:
                return None
            found = size_of(target)
            return self.make_adapter(target, *found) if found else None

        return self.make_network(targets, make, factors or ()).attach()

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the fields taken together."""
        if self.rank_from_weights and self.weights is None:
            yield Problem("rank_from_weights", "needs network.weights, a LoRA file to take the ranks from")

    def problems_with(self, config: TrainConfig) -> Iterator[Problem]:
        """Lists of another length than the model has blocks, and what optimizer or file to start from rule out."""
        optimizer, parts = config.optimizer, config.model.parts_named(self.parts)
        if self.weights is not None and os.path.isfile(self.weights):  # noqa: PTH113 - raises nothing
            from lorakit.networks.starting import problems_of_kind, starting_file

            try:
                file = starting_file(self.weights, config.model)
            except (ModelError, AdapterError) as error:
                yield Problem("weights", str(error).removesuffix("."))
            else:
                yield from list(problems_of_kind(file, config, self.algorithms)) or self.problems_of_file(file, config)
        wrong = [*self._wrong_lists(config.model), *self.wrong_choices(config)]
        yield from wrong
        if wrong or config.model.layout is None:
            return
        factors = self._block_factors(config.model.layout) or [1.0] * config.model.layout.count
        ranks = [getattr(self, key) for key in self._block_keys() if key.endswith("ranks")]
        ranks.append(self.block_weights(config.model))
        adapted = (factor > 0 and all(given[n] for given in ranks) for n, factor in enumerate(factors))
        if not any(part.encoders for part in parts) and not any(adapted):
            names = " and ".join(part.title for part in parts)
            yield Problem("parts", f"is the {names}, of which no block has both a rank and a learning rate above zero")
        if not optimizer.supports_lr_multipliers and set(factors) - {0.0, 1.0}:
            for key in filter(self._block_keys().__contains__, LR_WEIGHTS.values()):
                yield Problem(key, one_rate(optimizer), "give only 0 and 1, or choose another optimizer")

    def problems_of_file(self, file: StartingFile, config: TrainConfig) -> Iterator[Problem]:
        """Why a file with LoRA adapters for the model cannot be started from, as far as names and shapes tell."""
        from lorakit.networks.starting import problem_of_rank, problems_of_parts

        any_layers = self.rank_from_weights or self.selects_layers
        yield from problems_of_parts(file, config, any_layers)
        trained = config.model.parts_named(config.trained_parts)
        for key, wide in {"rank": False, "conv_rank": True}.items() if not any_layers else ():
            if hasattr(self, key):
                yield from problem_of_rank(file, key, getattr(self, key), file.ranks(trained, wide=wide))

    def warnings(self) -> Iterator[Problem]:
        """Sizes where those of a file count, unusual ones, and a threshold for nothing."""
        for option in fields(type(self)):
            if (
                self.rank_from_weights
                and option.name in self.size_keys
                and getattr(self, option.name) != option.default
            ):
                yield Problem(option.name, "has no effect with rank_from_weights, as the file says rank and alpha")
        if not self.rank_from_weights and self.rank > _LARGEST_USUAL_RANK:
            message = f"{self.rank} is more than many layers can use, and makes very large files"
            yield Problem("rank", message, "4 to 128 are usual")
        scaled = self.rank_from_weights or self.rank_stabilized
        if not scaled and self.alpha * _SMALLEST_USUAL_SCALE < self.rank:
            message = f"{self.alpha:g} with rank {self.rank} multiplies the updates by {self.alpha / self.rank:.2g}"
            yield Problem("alpha", message, "from half the rank to the rank is usual; else raise optimizer.lr")
        if self.block_lr_zero_threshold and not set(self._block_keys()) & set(LR_WEIGHTS.values()):
            yield Problem("block_lr_zero_threshold", f"has no effect without {', '.join(LR_WEIGHTS.values())}")

    def warnings_with(self, config: TrainConfig) -> Iterator[Problem]:
        """Options for parts of the model that get no adapters."""
        parts = config.model.parts_named(self.parts)
        if all(part.encoders for part in parts):
            names = " or ".join(repr(part.name) for part in config.model.parts if not part.encoders)
            groups = (key for key in ("group_ranks", "group_lr_weights") if getattr(self, key))
            for key in (*self._block_keys(), *groups):
                yield Problem(key, f"has no effect, because {names} is not in network.parts")

    def _block_keys(self) -> tuple[str, ...]:
        """The fields for single blocks that are given."""
        keys = (*(key for key in self.size_keys if "block" in key), *LR_WEIGHTS.values())
        return tuple(key for key in keys if getattr(self, key) is not None)

    def _wrong_lists(self, model: ModelFamilyConfig) -> Iterator[Problem]:
        layout, group_of = model.layout, {key: group for group, key in LR_WEIGHTS.items()}
        for key in self._block_keys():
            given = getattr(self, key)
            if layout is None or (key in group_of and group_of[key] not in layout.groups):
                missing = "are not numbered" if layout is None else f"have no group {group_of[key]!r}"
                yield Problem(key, f"cannot be used: the blocks of {model.name} {missing}", "leave it out")
                continue
            length = len(layout.groups[group_of[key]]) if key in group_of else layout.count
            if isinstance(given, tuple) and len(given) != length:
                yield Problem(key, f"must have {length} numbers for {model.name}, not {len(given)}")

    def _block_factors(self, layout: BlockLayout) -> list[float] | None:
        """What multiplies the learning rate in each block, 0 where it gets no adapters; None if nothing does."""
        given = {group: value for group, key in LR_WEIGHTS.items() if (value := getattr(self, key)) is not None}
        if not given:
            return None
        values = {
            group: curve(value, len(layout.groups[group])) if isinstance(value, str) else value
            for group, value in given.items()
        }
        return [factor if factor > self.block_lr_zero_threshold else 0.0 for factor in layout.spread(values)]

    def _size(self, target: AdaptationTarget) -> tuple[RankAlphas, Mapping[str, Tensor]] | None:
        size = self.rank_and_alpha(target)
        if self.layers is not None:
            size = (size or (self.rank, self.alpha)) if self.is_chosen(target) else None
        if size is None:
            return None
        rank, alpha = size
        if target.block_index is not None:
            from lorakit.networks.lora_function import is_pointwise

            wide = getattr(self, "conv_rank", None) is not None and not is_pointwise(target.module)
            kind, group = "conv_" if wide else "", self.group_rank(target)
            ranks, alphas = getattr(self, f"{kind}block_ranks"), getattr(self, f"{kind}block_alphas")
            rank = rank if ranks is None else ranks[target.block_index]
            alpha = alpha if alphas is None else alphas[target.block_index]
            # Convolutions keep their rank, where their group has one at all.
            rank = rank if group is None or (wide and group) else group
        if not rank:
            return None
        return (rank, alpha * math.sqrt(rank) if self.rank_stabilized else alpha, self.file_alpha(target)), {}


def _sizes_in(tensors: Mapping[str, Tensor]) -> _SizeOf:
    """The sizes of the adapters in a file's tensors, whose most common alpha files will hold."""
    from lorakit.networks.adapter_file import ranks_and_alphas

    found = ranks_and_alphas(tensors)
    common = Counter(alpha for _, alpha in found.values()).most_common(1)
    by_layer: dict[str, dict[str, Tensor]] = {key: {} for key in found}
    for name, tensor in tensors.items():
        key, _, suffix = name.partition(".")
        by_layer.setdefault(key, {})[suffix] = tensor

    def size(target: AdaptationTarget) -> tuple[RankAlphas, Mapping[str, Tensor]] | None:
        key = target.key
        return ((*found[key], common[0][0]), by_layer[key]) if key in found else None

    return size
