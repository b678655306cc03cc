"""LoRA: a low-rank update beside a frozen layer, y = W·x + b + (alpha/rank)·U·(D·x).

Hu et al., 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorakit.errors import AdapterError
from lorakit.models.layers import is_plain
from lorakit.models.protocol import AdaptationTarget
from lorakit.networks.dropout import DropoutRates, Dropouts
from lorakit.networks.functions import DrawMask, operation_for
from lorakit.networks.network import AdapterModule, Network
from lorakit.randomness import keyed_generator

_ALPHA_TOLERANCE = 2.0**-8
"""Relative; what the coarsest number format of LoRA files, bfloat16, does to an alpha."""


class LoRAModule(AdapterModule):
    """A LoRA adapter of a linear layer or a convolution.

    The down factor D has the base weight's shape with `rank` outputs, so a convolution keeps its kernel
    and stride; the up factor U is [out, rank], for convolutions [out, rank, 1, 1].
    """

    def __init__(self, key: str, base: nn.Module, rank: int, alpha: float) -> None:
        """An adapter with no effect yet. Raises `AdapterError` for layers of other kinds."""
        super().__init__(key, base)
        if not is_plain(base):
            raise AdapterError(f"{key} cannot be adapted: it is neither a linear layer nor a plain 2-D convolution.")
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        weight = base.weight
        device, (out, *inputs) = weight.device, weight.shape
        self.lora_down = nn.Parameter(torch.empty(rank, *inputs, dtype=torch.float32, device=device))
        self.lora_up = nn.Parameter(torch.empty(out, rank, *[1] * len(inputs[1:]), dtype=torch.float32, device=device))
        self.draw_mask: DrawMask | None = None
        self._operation = operation_for(base)
        self.initialize(0)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """D uniform in ±1/√inputs, which is Kaiming's with a = √5, and U zero."""
        bound = 1 / math.sqrt(self.lora_down[0].numel())
        draws = keyed_generator(seed, "lora_down", self.key).random(tuple(self.lora_down.shape), "float32")
        self.lora_down.copy_(torch.from_numpy(draws)).mul_(2 * bound).sub_(bound)
        self.lora_up.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output plus multiplier·scale·U·(D·x), in the dtype of the base's output."""
        scale = self.scale * self.multiplier
        if scale == 0:
            output: Tensor = self.base(x)
            return output
        draw_mask = self.draw_mask if self.training else None
        return self._operation(x, self.lora_down, self.lora_up, self.base, scale, draw_mask)

    def tensors(self) -> dict[str, Tensor]:
        """Both factors and alpha, a number."""
        alpha = torch.tensor(self.alpha, dtype=torch.float32)
        return {"lora_down.weight": self.lora_down, "lora_up.weight": self.lora_up, "alpha": alpha}

    def misfit(self, tensors: Mapping[str, Tensor]) -> str:
        """Names rank and alpha where they differ, and shapes otherwise."""
        down, alpha = tensors["lora_down.weight"], tensors["alpha"]
        if down.ndim and len(down) != self.rank:
            return f"rank {len(down)} in the file, {self.rank} in the config"
        if alpha.numel() == 1 and not math.isclose(alpha.item(), self.alpha, rel_tol=_ALPHA_TOLERANCE):
            return f"alpha {alpha.item():g} in the file, {self.alpha:g} in the config"
        return super().misfit(tensors)


class LoRANetwork(Network):
    """LoRA adapters, with dropout."""

    def __init__(
        self,
        targets: Sequence[AdaptationTarget],
        make: Callable[[AdaptationTarget], LoRAModule | None],
        rates: DropoutRates,
    ) -> None:
        """Make the adapters; `make` returns None for a layer that gets none."""
        super().__init__(targets, make)
        self._dropouts: Dropouts | None = None
        if rates:
            adapters = [adapter for adapter in self.adapters if isinstance(adapter, LoRAModule)]
            rank = max(adapter.rank for adapter in adapters)
            self._dropouts = Dropouts(rates, [adapter.key for adapter in adapters], rank)
            for adapter, dropout in zip(adapters, self._dropouts.adapters, strict=True):
                adapter.draw_mask = dropout.mask

    def begin_batch(self, sample_seeds: Tensor) -> None:
        """Draw the micro-batch's dropouts from its images' seeds, int64 [B]."""
        if self._dropouts is not None:
            device = next(self.adapters.parameters()).device
            self._dropouts.begin_batch(sample_seeds.to(device, non_blocking=True))
