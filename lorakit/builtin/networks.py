"""The networks that come with lorakit: LoRA for the layers that sd-scripts calls LierLa and C3Lier, LoHa and LoKr."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit.api import LoRAConfig, NetworkConfig, Problem, hookimpl
from lorakit.api.network_metadata import LYCORIS_MODULE
from lorakit.networks.ranked_config import RankAlphas, RankedConfig, per_block

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from lorakit.api import AdaptationTarget, TrainConfig
    from lorakit.networks.loha import LoHaModule
    from lorakit.networks.lokr import LoKrModule
    from lorakit.networks.lora_function import Layer
    from lorakit.networks.starting import StartingFile

_CONV_KEYS = ("conv_rank", "conv_alpha", "conv_block_ranks", "conv_block_alphas")


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
        any_layers = self.rank_from_weights or self.layers
        if not any_layers and file.trains_denoiser(config) and file.has_resnets:
            found = f"is lierla, and {file.path} is of c3lier: it has adapters for ResNet blocks, too"
            yield Problem("name", found, 'set network.name = "c3lier", or network.rank_from_weights = true')


@frozen(kw_only=True)
class C3LierConfig(LoRAConfig):
    """LoRA-C3Lier: LoRA-LierLa plus the convolutions of ResNet, downsampling and upsampling blocks (LoCon)."""

    name = "c3lier"
    size_keys = (*LoRAConfig.size_keys, *_CONV_KEYS)

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

        return self.alpha if is_pointwise(target.module) or self.selects_layers else self.conv_alpha

    def problems_of_file(self, file: StartingFile, config: TrainConfig) -> Iterator[Problem]:
        """A file of LoRA-LierLa, and what no network can start from."""
        yield from super().problems_of_file(file, config)
        any_layers = self.rank_from_weights or self.selects_layers
        if not any_layers and file.trains_denoiser(config) and not file.has_resnets:
            found = f"is c3lier, and {file.path} is of lierla: it has no adapters for ResNet blocks"
            yield Problem("name", found, 'set network.name = "lierla"')


@frozen(kw_only=True)
class _LyCORISConfig(RankedConfig):
    """Another algorithm than LoRA, for the layers of LoRA-LierLa, or with `conv_rank` those of LoRA-C3Lier."""

    size_keys = (*RankedConfig.size_keys, *_CONV_KEYS)
    network_module = LYCORIS_MODULE

    conv_rank: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Rank for 3×3 convolutions. When absent, ResNet, downsampling and upsampling blocks get no adapters at all."""
    conv_alpha: float | None = field(default=None, validator=v.optional(v.gt(0)))
    """Alpha for 3×3 convolutions, whose update is multiplied by conv_alpha / conv_rank; `alpha` when absent."""
    conv_block_ranks: tuple[int, ...] | None = per_block(v.ge(0))
    """One rank of 3×3 convolutions for each block instead of `conv_rank`, as `block_ranks`."""
    conv_block_alphas: tuple[float, ...] | None = per_block(v.gt(0))
    """One alpha of 3×3 convolutions for each block instead of `conv_alpha`."""

    def rank_and_alpha(self, target: AdaptationTarget) -> tuple[int, float] | None:
        """Those of linear layers and 1×1 convolutions, and those of the other convolutions, where these are adapted."""
        from torch import nn

        from lorakit.networks.lora_function import is_pointwise

        if is_pointwise(target.module):
            adapted = self.conv_rank is not None or target.tags & {"transformer", "text_encoder"}
            return (self.rank, self.alpha) if adapted else None
        if (
            self.conv_rank is None
            or not target.tags & {"resnet", "sampler"}
            or not isinstance(target.module, nn.Conv2d)
        ):
            return None
        return self.conv_rank, self.alpha if self.conv_alpha is None else self.conv_alpha

    def file_alpha(self, target: AdaptationTarget) -> float:
        """That of 3×3 convolutions is `conv_alpha`."""
        from lorakit.networks.lora_function import is_pointwise

        return self.alpha if is_pointwise(target.module) or self.conv_alpha is None else self.conv_alpha

    def module_args(self) -> Mapping[str, object]:
        """The arguments as LyCORIS calls them."""
        shared = dict(super().module_args())
        return {"algo": self.name, **shared, "rank_stabilized": None, "rs_lora": self.rank_stabilized}

    def warnings(self) -> Iterator[Problem]:
        """Also options of convolutions that are not adapted."""
        yield from super().warnings()
        for key in _CONV_KEYS[1:] if self.conv_rank is None and not self.rank_from_weights else ():
            if getattr(self, key) is not None:
                yield Problem(key, "has no effect without conv_rank, as no convolutions of ResNet blocks are adapted")


@frozen(kw_only=True)
class LoHaConfig(_LyCORISConfig):
    """LoHa: updates are Hadamard products of two low-rank matrices, of rank up to rank² (LyCORIS, FedPara).

    A quarter of a LoRA's rank is usual, 4 to 32; a step takes longer.
    """

    name = "loha"
    algorithms = frozenset({"LoHa"})

    def make_adapter(
        self,
        target: AdaptationTarget,
        size: RankAlphas,
        tensors: Mapping[str, Tensor],  # noqa: ARG002
    ) -> LoHaModule:
        """A LoHa adapter."""
        from lorakit.networks.loha import LoHaModule

        return LoHaModule(target.key, target.module, *size)


@frozen(kw_only=True)
class LoKrConfig(_LyCORISConfig):
    """LoKr: updates are Kronecker products of two small matrices, for very small files (LyCORIS).

    Where a matrix is at most twice as wide as the rank, it is trained itself; where both are, alpha has no effect.
    """

    name = "lokr"
    algorithms = frozenset({"LoKr"})

    factor: int = field(default=-1, validator=v.or_(v.in_([-1]), v.ge(1)))
    """The smaller matrix is about this wide, where that divides the layer's width; a lower factor trains more and makes
    larger files. With -1 both matrices are as equal as can be. 4 to 16 are usual."""
    decompose_both: bool = False
    """Split the smaller matrix into two factors, too, where it is more than twice as wide as the rank."""
    full_matrix: bool = False
    """Split neither matrix into factors, whatever the rank: `factor` alone says how large they are."""

    def make_adapter(self, target: AdaptationTarget, size: RankAlphas, tensors: Mapping[str, Tensor]) -> LoKrModule:
        """A LoKr adapter."""
        from lorakit.networks.lokr import LoKrModule, Split

        def split(layer: Layer) -> Split:
            if tensors:
                return Split.in_file(layer, tensors)
            both, full = self.decompose_both, self.full_matrix
            return Split.of(layer, size[0], self.factor, decompose_both=both, full_matrix=full)

        return LoKrModule(target.key, target.module, size, split)

    def module_args(self) -> Mapping[str, object]:
        """The arguments as LyCORIS calls them, with the factor."""
        own = {"decompose_both": self.decompose_both, "full_matrix": self.full_matrix}
        return {**super().module_args(), "factor": self.factor, **own}


@hookimpl
def register_networks() -> list[type[NetworkConfig]]:
    """LoRA-LierLa, LoRA-C3Lier, LoHa and LoKr."""
    return [LierlaConfig, C3LierConfig, LoHaConfig, LoKrConfig]
