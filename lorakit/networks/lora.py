"""LoRA: a low-rank update of a frozen layer, y = W·x + b + (alpha/rank)·U·(D·x).

Hu et al., 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from attrs import evolve
from torch import Tensor, nn

from lorakit.models.interfaces import AdaptationTarget
from lorakit.networks.dropout import AdapterDropout, DropoutRates
from lorakit.networks.flat_parameters import FlatParameters
from lorakit.networks.lora_function import DropoutMask, FlatFactors, low_rank_operation
from lorakit.networks.max_norm import MaxNorm
from lorakit.networks.network import ParameterGroup
from lorakit.networks.ranked import SAME_RATES, LRFactors, RankedModule, RankedNetwork
from lorakit.networks.shared_input import SharedInput
from lorakit.utils.rng import keyed_generator


class LoRAModule(RankedModule):
    """A LoRA adapter of a linear layer or a convolution.

    The down factor D has the base weight's shape with `rank` outputs, so a convolution keeps its kernel
    and stride; the up factor U is [out, rank], for convolutions [out, rank, 1, 1].
    """

    def __init__(self, key: str, base: nn.Module, rank: int, alpha: float, file_alpha: float | None = None) -> None:
        """An adapter with no effect yet; `file_alpha` is the alpha in files, where it differs.

        Raises `AdapterError` for layers of other kinds.
        """
        super().__init__(key, base, rank, alpha, file_alpha)
        weight = self.base.weight
        device, (out, *inputs) = weight.device, weight.shape
        self.lora_down = nn.Parameter(torch.empty(rank, *inputs, dtype=torch.float32, device=device))
        self.lora_up = nn.Parameter(torch.empty(out, rank, *[1] * len(inputs[1:]), dtype=torch.float32, device=device))
        self.draw_mask: DropoutMask | None = None
        self.flat: FlatFactors | None = None
        self.shared: SharedInput | None = None
        LoRAModule.initialize(self, 0)

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
        if self.shared is not None and self.shared.takes(x):
            return self.shared.output(self, x, scale)
        draw_mask = self.draw_mask if self.training else None
        return low_rank_operation(x, self.lora_down, self.lora_up, self.base, scale, draw_mask, self.flat)

    def use_dropout(self, dropout: AdapterDropout, rates: DropoutRates) -> None:  # noqa: ARG002
        """Drop at random while training, at these rates."""
        self.draw_mask = dropout.mask

    def use_flat(self, flat: FlatParameters) -> None:
        """Compute with the copies of both factors in flat buffers, and add their gradients there."""
        down, up = flat.view(self.lora_down), flat.view(self.lora_up)
        self.flat = (down, up) if down and up else None

    def factors(self) -> dict[str, nn.Parameter]:
        """Both matrices."""
        return {"lora_down.weight": self.lora_down, "lora_up.weight": self.lora_up}

    def rank_of(self, tensors: Mapping[str, Tensor]) -> int | None:
        """The outputs of the down factor."""
        down = tensors["lora_down.weight"]
        return len(down) if down.ndim else None


class LoRANetwork(RankedNetwork):
    """LoRA adapters, with dropout, and learning rates that may vary."""

    def __init__(
        self,
        targets: Sequence[AdaptationTarget],
        make: Callable[[AdaptationTarget], RankedModule | None],
        rates: DropoutRates,
        lr_factors: LRFactors = SAME_RATES,
        max_norm: float | None = None,
    ) -> None:
        """Make the adapters; `make` returns None for a layer that gets none.

        `max_norm` is the largest norm that updates may have after a step.
        """
        super().__init__(targets, make, rates, lr_factors)
        adapters = [adapter for adapter in self.adapters if isinstance(adapter, LoRAModule)]
        factors = [(adapter.lora_up, adapter.lora_down, adapter.scale) for adapter in adapters]
        self._max_norm = MaxNorm(factors, max_norm) if max_norm else None

    def group_of(self, target: AdaptationTarget, parameter_name: str) -> tuple[str, float]:
        """Blocks and up matrices with other learning rates than the rest of their part are separate groups."""
        name, factor = super().group_of(target, parameter_name)
        up = self._lr_factors.denoiser_up if target.encoder_index is None else self._lr_factors.text_encoder_up
        if up is not None and parameter_name == "lora_up":
            name, factor = f"{name} plus", factor * up
        return name, factor

    def parameter_groups(self, lr_for: Callable[[AdaptationTarget], float]) -> list[ParameterGroup]:
        """The trained parameters by learning rate; those of adapters that read the same input follow one another.

        So they do whether one operation computes the adapters or not, as states hold them in this order.
        """
        order: dict[nn.Parameter, int] = {}
        for own in self._alike(lambda target: target.shared_input):
            for parameter in (*(adapter.lora_down for adapter in own), *(adapter.lora_up for adapter in own)):
                order[parameter] = len(order)
        return [
            evolve(group, parameters=tuple(sorted(group.parameters, key=lambda one: order.get(one, len(order)))))
            for group in super().parameter_groups(lr_for)
        ]

    def use_flat(self, flat: FlatParameters) -> None:
        """Let adapters compute with flat buffers, those that share their input in one operation."""
        super().use_flat(flat)
        if self._dropouts is not None:  # their masks are drawn for each adapter
            return
        for own in self._alike(lambda target: (target.shared_input, target.shares_within)):
            shared = SharedInput(own, flat)
            for adapter in own:
                adapter.shared = shared

    def _alike(self, input_of: Callable[[AdaptationTarget], object]) -> list[list[LoRAModule]]:
        """Linear layers' adapters with the same input and shapes, two or more in each list."""
        found: dict[tuple[object, ...], list[LoRAModule]] = {}
        for target, adapter in zip(self._targets, self.adapters, strict=True):
            # Other kinds compute more than a sum.
            if not target.shared_input or type(adapter) is not LoRAModule or not isinstance(adapter.base, nn.Linear):
                continue
            if not (adapter.lora_down.requires_grad and adapter.lora_up.requires_grad):
                continue
            groups = (self.group_of(target, name) for name in ("lora_down", "lora_up"))
            shapes = (adapter.lora_down.shape, adapter.lora_up.shape, adapter.scale, adapter.base.bias is None)
            found.setdefault((target.part, input_of(target), *shapes, *groups), []).append(adapter)
        return [own for own in found.values() if len(own) > 1]

    def on_optimizer_step(self) -> Mapping[str, Tensor]:
        """Scale down updates beyond the largest norm; returns the norms for logs."""
        return self._max_norm.apply() if self._max_norm else {}
