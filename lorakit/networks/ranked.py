"""What adapters whose updates have a rank have in common: LoRA, LoHa and LoKr.

Such an adapter computes y = W·x + b + (alpha/rank)·ΔW·x; a subclass says what ΔW is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from attrs import frozen
from torch import Tensor, nn

from lorakit.errors import AdapterError
from lorakit.models.interfaces import AdaptationTarget
from lorakit.models.memory.quantization import is_adaptable
from lorakit.networks.dropout import AdapterDropout, DropoutRates, NetworkDropout
from lorakit.networks.network import AdapterModule, Network

_ALPHA_TOLERANCE = 2.0**-8
"""Relative; what the coarsest number format of LoRA files, bfloat16, does to an alpha."""


class RankedModule(AdapterModule):
    """An adapter of a linear layer or a convolution, whose update is multiplied by alpha/rank."""

    base: nn.Linear | nn.Conv2d

    def __init__(self, key: str, base: nn.Module, rank: int, alpha: float, file_alpha: float | None = None) -> None:
        """An adapter of the given rank; `file_alpha` is the alpha in files, where it differs.

        Raises `AdapterError` for layers of other kinds.
        """
        super().__init__(key, base)
        if not is_adaptable(base):
            raise AdapterError(f"{key} cannot be adapted: it is neither a linear layer nor a plain 2-D convolution.")
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.file_alpha = alpha if file_alpha is None else file_alpha

    def factors(self) -> dict[str, nn.Parameter]:
        """The trained tensors by suffix as in a file; the update is proportional to the last one."""
        raise NotImplementedError

    def rank_of(self, tensors: Mapping[str, Tensor]) -> int | None:
        """The rank of an adapter in a file by its tensors; None where they do not show it."""
        raise NotImplementedError

    def use_dropout(self, dropout: AdapterDropout, rates: DropoutRates) -> None:
        """Drop at random while training, at these rates."""
        raise NotImplementedError

    def adapter_state(self) -> dict[str, Tensor]:
        """The factors and alpha."""
        return {**self.factors(), "alpha": torch.tensor(self.alpha, dtype=torch.float32)}

    def export_state(self) -> dict[str, Tensor]:
        """The factors and the file's alpha; the last factor makes up for the difference."""
        tensors = self.adapter_state()
        if self.file_alpha != self.alpha:
            tensors[self._last] = tensors[self._last] * (self.alpha / self.file_alpha)
            tensors["alpha"] = torch.tensor(self.file_alpha, dtype=torch.float32)
        return tensors

    def shape_mismatch(self, tensors: Mapping[str, Tensor]) -> str:
        """Names the rank where it differs, and shapes otherwise."""
        rank, alpha = self.rank_of(tensors), tensors["alpha"]
        if rank not in (None, self.rank):
            return f"rank {rank} in the file, {self.rank} in the config"
        if alpha.numel() == 1 and not math.isfinite(alpha.item()):
            return f"alpha {alpha.item():g} in the file"
        return super().shape_mismatch(tensors)

    @torch.no_grad()
    def load_adapter_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the factors; where the file has another alpha, the last factor makes up for the difference."""
        super().load_adapter_state(tensors)
        factor = self._meant(tensors["alpha"].item()) / self.alpha
        if factor != 1:
            self.factors()[self._last].mul_(factor)

    @property
    def _last(self) -> str:
        return [*self.factors()][-1]

    def _meant(self, alpha: float) -> float:
        """An alpha as it was before a file's number format rounded it, if it is one of this adapter's own."""
        own = [near for near in (self.alpha, self.file_alpha) if math.isclose(alpha, near, rel_tol=_ALPHA_TOLERANCE)]
        return min(own, key=lambda near: abs(near - alpha), default=alpha)


@frozen
class LRFactors:
    """How learning rates vary over a network."""

    blocks: Sequence[float] = ()
    """Multiplies the learning rate in each numbered block; with none, the denoiser is one parameter group."""
    groups: Mapping[str, float] = {}
    """Multiplies the learning rate in groups of blocks, by the name of the group."""
    denoiser_up: float | None = None
    """Multiplies the learning rate of the denoiser's up matrices: LoRA+ (Hayou et al., 2024, arXiv:2402.12354)."""
    text_encoder_up: float | None = None
    """The same for text encoders."""


SAME_RATES = LRFactors()
"""Learning rates that do not vary."""


class RankedNetwork(Network):
    """Adapters with a rank, with dropout, and learning rates that may vary by block."""

    def __init__(
        self,
        targets: Sequence[AdaptationTarget],
        make: Callable[[AdaptationTarget], RankedModule | None],
        rates: DropoutRates,
        lr_factors: LRFactors = SAME_RATES,
    ) -> None:
        """Make the adapters; `make` returns None for a layer that gets none."""
        super().__init__(targets, make)
        self._lr_factors = lr_factors
        self._dropouts: NetworkDropout | None = None
        if rates:
            adapters = [adapter for adapter in self.adapters if isinstance(adapter, RankedModule)]
            rank = max(adapter.rank for adapter in adapters)
            self._dropouts = NetworkDropout(rates, [adapter.key for adapter in adapters], rank)
            for adapter, dropout in zip(adapters, self._dropouts.adapters, strict=True):
                adapter.use_dropout(dropout, rates)

    def group_of(self, target: AdaptationTarget, parameter_name: str) -> tuple[str, float]:
        """Blocks with other learning rates than the rest of their part are separate groups."""
        name, factor = super().group_of(target, parameter_name)
        blocks, groups, block = self._lr_factors.blocks, self._lr_factors.groups, target.block_index
        if blocks and block is not None:
            name, factor = f"{name}_block{block}", factor * blocks[block]
        if block is not None and target.layout and (group := target.layout.group_of(block)) in groups:
            name, factor = f"{name}_{group}", factor * groups[group]
        return name, factor

    def begin_batch(self, sample_seeds: Tensor) -> None:
        """Draw the micro-batch's dropouts from its images' seeds, int64 [B]."""
        if self._dropouts is not None:
            device = next(self.adapters.parameters()).device
            self._dropouts.begin_batch(sample_seeds.to(device))
