"""The network `lierla`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.api.components import NetworkConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.errors import Problem
from lorakit.networks.config import LoRAConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorakit.config.train_config import TrainConfig
    from lorakit.models.interfaces import AdaptationTarget
    from lorakit.networks.starting import StartingFile


@frozen(kw_only=True)
class LierlaConfig(LoRAConfig):
    """LoRA-LierLa: adapters for the linear layers and 1×1 convolutions of the transformers, and the text encoder."""

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


@hookimpl
def register_networks() -> list[type[NetworkConfig]]:
    """LoRA-LierLa."""
    return [LierlaConfig]
