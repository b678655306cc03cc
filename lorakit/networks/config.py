"""What networks of LoRA adapters have in common as components; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import ModelPart
from lorakit.errors import Problem
from lorakit.networks.layer_choice import one_rate
from lorakit.networks.ranked_config import RankAlphas, RankedConfig

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.config.train_config import TrainConfig
    from lorakit.models.interfaces import AdaptationTarget
    from lorakit.networks.lora import LoRAModule
    from lorakit.networks.network import Network
    from lorakit.networks.ranked import RankedModule


@frozen(kw_only=True)
class LoRAConfig(RankedConfig):
    """A network of LoRA adapters; a subclass says which layers get one, and of which rank."""

    algorithms = frozenset({"LoRA", "DoRA"})

    dropout: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    """Probability of dropping each activation between the two LoRA matrices in training. 0.1 to 0.3 are usual."""
    rank_dropout: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    """Probability of dropping each rank, for each image, in training."""
    loraplus_lr_ratio: float | None = field(default=None, validator=v.optional(v.gt(0)))
    """Multiplies the learning rate of the lora_up matrices, as in LoRA+ (Hayou et al., 2024, arXiv:2402.12354). 4 to 16
    are usual; 1 when absent."""
    loraplus_unet_lr_ratio: float | None = field(default=None, validator=v.optional(v.gt(0)))
    """The same for the denoiser only; `loraplus_lr_ratio` when absent."""
    loraplus_text_encoder_lr_ratio: float | None = field(default=None, validator=v.optional(v.gt(0)))
    """The same for text encoders only; `loraplus_lr_ratio` when absent."""
    dora: bool = False
    """Train the magnitude of each output separately from its direction (DoRA, Liu et al., 2024, arXiv:2402.09353):
    often better at low ranks, slower, and not read alike by all tools."""
    scale_weight_norms: float | None = field(default=None, validator=v.optional(v.gt(0)))
    """Scale each layer's update down to this norm after each step where it is larger, so that no layer overpowers the
    others. 1 is usual; no limit when absent."""

    def make_adapter(self, target: AdaptationTarget, size: RankAlphas, tensors: Mapping[str, Tensor]) -> LoRAModule:  # noqa: ARG002
        """A LoRA adapter, or one of DoRA."""
        from lorakit.networks.dora import DoRAModule
        from lorakit.networks.lora import LoRAModule

        return (DoRAModule if self.dora else LoRAModule)(target.key, target.module, *size)

    def make_network(
        self,
        targets: Sequence[AdaptationTarget],
        make: Callable[[AdaptationTarget], RankedModule | None],
        blocks: Sequence[float],
    ) -> Network:
        """With all dropouts, LoRA+ and the largest norm."""
        from lorakit.networks.dropout import DropoutRates
        from lorakit.networks.lora import LoRANetwork
        from lorakit.networks.ranked import LRFactors

        rates = DropoutRates(neuron=self.dropout, rank=self.rank_dropout, module=self.module_dropout)
        lr_factors = LRFactors(
            blocks=blocks,
            groups=self.group_lr_weights or {},
            denoiser_up=self._first_given("loraplus_unet_lr_ratio", "loraplus_lr_ratio"),
            text_encoder_up=self._first_given("loraplus_text_encoder_lr_ratio", "loraplus_lr_ratio"),
        )
        return LoRANetwork(targets, make, rates, lr_factors, self.scale_weight_norms)

    def problems_with(self, config: TrainConfig) -> Iterator[Problem]:
        """What optimizer, model and file to start from rule out."""
        optimizer = config.optimizer
        used = {key for part in config.model.parts_named(self.parts) if (key := self._loraplus_key(part))}
        for key in sorted(used if not optimizer.supports_lr_multipliers else ()):
            if getattr(self, key) != 1:
                yield Problem(key, one_rate(optimizer), "leave it out, or choose another optimizer")
        yield from super().problems_with(config)

    def warnings_with(self, config: TrainConfig) -> Iterator[Problem]:
        """Options for parts of the model that get no adapters."""
        used = {self._loraplus_key(part) for part in config.model.parts_named(self.parts)}
        for key in ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"):
            if getattr(self, key) is not None and key not in used:
                yield Problem(key, "has no effect, because no part in network.parts uses it")
        yield from super().warnings_with(config)

    def _loraplus_key(self, part: ModelPart) -> str | None:
        """The field with the LoRA+ ratio of a part, if there is one."""
        keys = (f"loraplus_{part.lr_key}_ratio", "loraplus_lr_ratio")
        return next((key for key in keys if getattr(self, key) is not None), None)

    def _first_given(self, *keys: str) -> float | None:
        return next((value for key in keys if (value := getattr(self, key)) is not None), None)
