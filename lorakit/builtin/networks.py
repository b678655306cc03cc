"""The networks that come with lorakit: LoRA for the layers that sd-scripts calls LierLa and C3Lier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit.api import LoRAConfig, NetworkConfig, Problem, hookimpl
from lorakit.networks.config import per_block

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorakit.api import AdaptationTarget, TrainConfig
    from lorakit.networks.starting import StartingFile


@frozen(kw_only=True)
class LierlaConfig(LoRAConfig):
    """LoRA-LierLa: adapters for linear layers and 1×1 convolutions of the transformer blocks and the text encoder."""

    name = "lierla"

    def rank_and_alpha(self, target: AdaptationTarget) -> tuple[int, float] | None:
        """The same for all linear layers and 1×1 convolutions of transformers and text encoders."""
        from lorakit.networks.lora_function import is_pointwise

        adapted = target.tags & {"transformer", "text_encoder"} and is_pointwise(target.module)
        return (self.rank, self.alpha) if adapted else None

    def problems_of_file(self, file: StartingFile, config: TrainConfig) -> Iterator[Problem]:
        """A file of LoRA-C3Lier, and what no network can start from."""
        yield from super().problems_of_file(file, config)
        if not self.rank_from_weights and file.trains_denoiser(config) and file.has_resnets:
            found = f"is lierla, and {file.path} is of c3lier: it has adapters for ResNet blocks, too"
            yield Problem("name", found, 'set network.name = "c3lier", or network.rank_from_weights = true')


@frozen(kw_only=True)
class C3LierConfig(LoRAConfig):
    """LoRA-C3Lier: LoRA-LierLa plus the convolutions of ResNet, downsampling and upsampling blocks (LoCon)."""

    name = "c3lier"
    size_keys = (*LoRAConfig.size_keys, "conv_rank", "conv_alpha", "conv_block_ranks", "conv_block_alphas")

    conv_rank: int = field(default=4, validator=v.ge(1))
    """Rank for 3×3 convolutions."""
    conv_alpha: float = field(default=1.0, validator=v.gt(0))
    """Alpha for 3×3 convolutions, whose update is multiplied by conv_alpha / conv_rank."""
    conv_block_ranks: tuple[int, ...] | None = per_block(v.ge(0))
    """One rank of 3×3 convolutions for each block instead of `conv_rank`, as `block_ranks`."""
    conv_block_alphas: tuple[float, ...] | None = per_block(v.gt(0))
    """One alpha of 3×3 convolutions for each block instead of `conv_alpha`."""

    def rank_and_alpha(self, target: AdaptationTarget) -> tuple[int, float] | None:
        """Those of the linear layers and 1×1 convolutions of all blocks, and those of the other convolutions."""
        from torch import nn

        from lorakit.networks.lora_function import is_pointwise

        if is_pointwise(target.module):
            return self.rank, self.alpha
        adapted = target.tags & {"resnet", "sampler"} and isinstance(target.module, nn.Conv2d)
        return (self.conv_rank, self.conv_alpha) if adapted else None

    def file_alpha(self, target: AdaptationTarget) -> float:
        """That of 3×3 convolutions is `conv_alpha`, unless they might outnumber the others, as in single blocks."""
        from lorakit.networks.lora_function import is_pointwise

        return self.alpha if is_pointwise(target.module) or self.varies_by_block else self.conv_alpha

    def problems_of_file(self, file: StartingFile, config: TrainConfig) -> Iterator[Problem]:
        """A file of LoRA-LierLa, and what no network can start from."""
        yield from super().problems_of_file(file, config)
        any_layers = self.rank_from_weights or self.varies_by_block
        if not any_layers and file.trains_denoiser(config) and not file.has_resnets:
            found = f"is c3lier, and {file.path} is of lierla: it has no adapters for ResNet blocks"
            yield Problem("name", found, 'set network.name = "lierla"')


@hookimpl
def register_networks() -> list[type[NetworkConfig]]:
    """LoRA-LierLa and LoRA-C3Lier."""
    return [LierlaConfig, C3LierConfig]
