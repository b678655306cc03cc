"""What networks of LoRA adapters have in common as components; imports no torch."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from attrs import field, fields, frozen
from attrs import validators as v

from lorakit.api.components import NetworkConfig
from lorakit.api.network_metadata import LORA_MODULE, NETWORK_ARG_KEYS, network_args
from lorakit.errors import AdapterError, ModelError, Problem

if TYPE_CHECKING:
    from pathlib import Path

    from lorakit.config.train_config import TrainConfig
    from lorakit.models.interfaces import AdaptationTarget
    from lorakit.networks.lora import LRFactors
    from lorakit.networks.network import Network
    from lorakit.networks.starting import StartingFile

_LARGEST_USUAL_RANK = 512
_SMALLEST_USUAL_SCALE = 128  # alpha 1 with rank 128 is much used

RankAlphas = tuple[int, float, float]
"""Rank of an adapter, its alpha, and the alpha that files hold for it."""


@frozen(kw_only=True)
class LoRAConfig(NetworkConfig):
    """A network of LoRA adapters; a subclass says which layers get one, and of which rank."""

    size_keys: ClassVar[tuple[str, ...]] = ("rank", "alpha", "rank_stabilized")
    """The fields that play no part when ranks and alphas are those of a file."""

    rank: int = field(default=4, validator=v.ge(1))
    """Rank of the learnt updates: a higher one learns more detail and makes a larger file. 4 to 128 are usual."""
    alpha: float = field(default=1.0, validator=v.gt(0))
    """Strength of the updates: they are multiplied by alpha / rank, so a higher alpha acts like a higher learning
    rate. From 1 to the rank."""
    rank_stabilized: bool = False
    """Multiply the updates by alpha / √rank instead, so that high ranks learn as fast as low ones (Kalajdzievski, 2023,
    arXiv:2312.03732). What a file holds is the same for all tools."""
    rank_from_weights: bool = False
    """Take ranks and alphas of all adapters from the file that `weights` names; layers that are not in it get none."""
    dropout: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    """Share of the numbers between the two factors that are dropped at random while training. 0.1 to 0.3 are usual."""
    rank_dropout: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    """Share of the ranks that are dropped at random, for each image, while training."""
    module_dropout: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    """Share of the adapters that are left out at random, for each image, while training."""
    loraplus_lr_ratio: float | None = field(default=None, validator=v.optional(v.gt(0)))
    """What multiplies the learning rate of the up factors, lora_up, as in LoRA+ (Hayou et al., 2024, arXiv:2402.12354).
    4 to 16 are usual; 1 when absent."""
    loraplus_unet_lr_ratio: float | None = field(default=None, validator=v.optional(v.gt(0)))
    """The same for the U-Net alone; `loraplus_lr_ratio` when absent."""
    loraplus_text_encoder_lr_ratio: float | None = field(default=None, validator=v.optional(v.gt(0)))
    """The same for the text encoder alone; `loraplus_lr_ratio` when absent."""
    dora: bool = False
    """Train the magnitude of each output apart from its direction (DoRA, Liu et al., 2024, arXiv:2402.09353): often
    better at low ranks, slower, and not read alike by all tools."""
    scale_weight_norms: float | None = field(default=None, validator=v.optional(v.gt(0)))
    """Largest norm of a layer's update: one that has grown beyond it is scaled back after each step, so that no layer
    overpowers the others. 1 is usual; no limit when absent."""

    def rank_and_alpha(self, target: AdaptationTarget) -> tuple[int, float] | None:
        """Rank and alpha of the adapter that a layer gets, or None if it gets none."""
        raise NotImplementedError(f"{type(self).__name__} does not say which layers it adapts")

    def adapts(self, target: AdaptationTarget) -> bool:
        """Whether a layer may get an adapter at all: whether it is of one of the `parts`."""
        return target.part in self.parts

    def file_alpha(self, target: AdaptationTarget) -> float:  # noqa: ARG002
        """The alpha that files hold for a layer: one for all, as some tools take the most common one for all."""
        return self.alpha

    def lr_factors(self, targets: Sequence[AdaptationTarget]) -> LRFactors:  # noqa: ARG002
        """How the learning rates vary over the adapters of these layers."""
        from lorakit.networks.lora import LRFactors

        ratios = {part: self._loraplus_ratio(part) for part in self.parts}
        return LRFactors(up={part: ratio for part, ratio in ratios.items() if ratio is not None})

    def metadata(self) -> Mapping[str, object]:
        """The network as sd-scripts has it: that of `networks.lora`, with what is not at its default as arguments."""
        own = {own.name: getattr(self, own.name) for own in fields(type(self))}
        return {
            "ss_network_module": LORA_MODULE,
            "ss_network_dim": "Dynamic" if self.rank_from_weights else self.rank,
            "ss_network_alpha": "Dynamic" if self.rank_from_weights else self.alpha,
            "ss_network_dropout": self.dropout,
            "ss_scale_weight_norms": self.scale_weight_norms,
            **network_args({name: own.get(key) for name, key in NETWORK_ARG_KEYS.items()}),
        }

    def build(self, targets: Sequence[AdaptationTarget]) -> Network:
        """The adapters, attached; all are of the given parts."""
        from lorakit.networks.dora import DoRAModule
        from lorakit.networks.dropout import DropoutRates
        from lorakit.networks.lora import LoRAModule, LoRANetwork

        module = DoRAModule if self.dora else LoRAModule
        size_of = self._sizes_in_weights(targets) if self.rank_from_weights else self._size

        def make(target: AdaptationTarget) -> LoRAModule | None:
            size = size_of(target) if self.adapts(target) else None
            return module(target.key, target.module, *size) if size else None

        rates = DropoutRates(neuron=self.dropout, rank=self.rank_dropout, module=self.module_dropout)
        return LoRANetwork(targets, make, rates, self.lr_factors(targets), self.scale_weight_norms).attach()

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the fields taken together."""
        if self.rank_from_weights and self.weights is None:
            yield Problem("rank_from_weights", "needs network.weights, a LoRA file to take the ranks from")

    def problems_with(self, config: TrainConfig) -> Iterator[Problem]:
        """Learning rates that vary where the optimizer can have only one, and a file that is not for this network."""
        optimizer = config.optimizer
        ratios = {key for part in self.parts if (key := self._loraplus_key(part))}
        for key in sorted(ratios if not optimizer.supports_lr_multipliers else ()):
            if getattr(self, key) != 1:
                hint = "leave it out, or choose another optimizer"
                yield Problem(key, f"cannot be used with {optimizer.name}, which finds one learning rate for all", hint)
        if self.weights is not None and os.path.isfile(self.weights):  # noqa: PTH113 - raises nothing
            yield from self._problems_of_weights(self.weights, config)

    def problems_of_file(self, file: StartingFile, config: TrainConfig) -> Iterator[Problem]:  # noqa: ARG002
        """Why a file with LoRA adapters for the model cannot be started from, as far as names and shapes tell."""
        return iter(())

    def warnings(self) -> Iterator[Problem]:
        """Ratios that no part has, and sizes where those of a file count."""
        used = {self._loraplus_key(part) for part in self.parts}
        for key in ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"):
            if getattr(self, key) is not None and key not in used:
                yield Problem(key, "has no effect, because no part in network.parts uses it")
        for own in fields(type(self)):
            if self.rank_from_weights and own.name in self.size_keys and getattr(self, own.name) != own.default:
                yield Problem(own.name, "has no effect with rank_from_weights, as the file says rank and alpha")
        if not self.rank_from_weights:
            yield from self._doubtful_sizes()

    def _doubtful_sizes(self) -> Iterator[Problem]:
        if self.rank > _LARGEST_USUAL_RANK:
            message = f"{self.rank} is more than many layers can use, and makes very large files"
            yield Problem("rank", message, "4 to 128 are usual")
        if not self.rank_stabilized and self.alpha * _SMALLEST_USUAL_SCALE < self.rank:
            message = f"{self.alpha:g} with rank {self.rank} multiplies what is learnt by {self.alpha / self.rank:.2g}"
            yield Problem("alpha", message, "from half the rank to the rank is usual; else raise optimizer.lr")

    def _problems_of_weights(self, path: Path, config: TrainConfig) -> Iterator[Problem]:
        from lorakit.networks.starting import problems_of_kind, starting_file

        try:
            file = starting_file(path)
        except (ModelError, AdapterError) as error:
            yield Problem("weights", str(error).removesuffix("."))
            return
        problems = list(problems_of_kind(file, config))
        yield from problems or self.problems_of_file(file, config)

    def _loraplus_key(self, part: str) -> str | None:
        """The field with the ratio of a part, if there is one."""
        keys = (f"loraplus_{part}_lr_ratio", "loraplus_lr_ratio")
        return next((key for key in keys if getattr(self, key, None) is not None), None)

    def _loraplus_ratio(self, part: str) -> float | None:
        key = self._loraplus_key(part)
        return getattr(self, key) if key else None

    def _size(self, target: AdaptationTarget) -> RankAlphas | None:
        size = self.rank_and_alpha(target)
        if size is None:
            return None
        rank, alpha = size
        return rank, alpha * math.sqrt(rank) if self.rank_stabilized else alpha, self.file_alpha(target)

    def _sizes_in_weights(self, targets: Sequence[AdaptationTarget]) -> Callable[[AdaptationTarget], RankAlphas | None]:
        """The sizes of the adapters in the file that `weights` names, whose most common alpha files will hold."""
        from lorakit.networks.adapter_file import load_initial_weights, ranks_and_alphas

        if self.weights is None:
            raise ValueError("rank_from_weights needs weights")
        found = ranks_and_alphas(load_initial_weights(self.weights, {target.key for target in targets}))
        common = Counter(alpha for _, alpha in found.values()).most_common(1)
        return lambda target: (*found[target.key], common[0][0]) if target.key in found else None
