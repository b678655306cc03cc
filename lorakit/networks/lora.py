"""LoRA: a low-rank update of a frozen layer, y = W·x + b + (alpha/rank)·U·(D·x).

Hu et al., 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from lorakit.errors import AdapterError
from lorakit.models.interfaces import AdaptationTarget
from lorakit.models.memory.quantization import is_adaptable
from lorakit.networks.dropout import AdapterDropout, DropoutRates, NetworkDropout
from lorakit.networks.flat_parameters import FlatParameters
from lorakit.networks.lora_function import DropoutMask, FlatFactors, low_rank_operation
from lorakit.networks.max_norm import MaxNorm
from lorakit.networks.network import AdapterModule, Network, ParameterGroup
from lorakit.networks.shared_input import SharedInput
from lorakit.utils.rng import keyed_generator

_ALPHA_TOLERANCE = 2.0**-8
"""Relative; what the coarsest number format of LoRA files, bfloat16, does to an alpha."""


class LoRAModule(AdapterModule):
    """A LoRA adapter of a linear layer or a convolution.

    The down factor D has the base weight's shape with `rank` outputs, so a convolution keeps its kernel
    and stride; the up factor U is [out, rank], for convolutions [out, rank, 1, 1].
    """

    def __init__(self, key: str, base: nn.Module, rank: int, alpha: float, file_alpha: float | None = None) -> None:
        """An adapter with no effect yet; `file_alpha` is the alpha in files, where it differs.

        Raises `AdapterError` for layers of other kinds.
        """
        super().__init__(key, base)
        if not is_adaptable(base):
            raise AdapterError(f"{key} cannot be adapted: it is neither a linear layer nor a plain 2-D convolution.")
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.file_alpha = alpha if file_alpha is None else file_alpha
        weight = base.weight
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

    def adapter_state(self) -> dict[str, Tensor]:
        """Both matrices and alpha."""
        alpha = torch.tensor(self.alpha, dtype=torch.float32)
        return {"lora_down.weight": self.lora_down, "lora_up.weight": self.lora_up, "alpha": alpha}

    def export_state(self) -> dict[str, Tensor]:
        """Both matrices and the file's alpha; the up matrix makes up for the difference."""
        tensors = self.adapter_state()
        if self.file_alpha != self.alpha:
            tensors["lora_up.weight"] = self.lora_up * (self.alpha / self.file_alpha)
            tensors["alpha"] = torch.tensor(self.file_alpha, dtype=torch.float32)
        return tensors

    def shape_mismatch(self, tensors: Mapping[str, Tensor]) -> str:
        """Names the rank where it differs, and shapes otherwise."""
        down, alpha = tensors["lora_down.weight"], tensors["alpha"]
        if down.ndim and len(down) != self.rank:
            return f"rank {len(down)} in the file, {self.rank} in the config"
        if alpha.numel() == 1 and not math.isfinite(alpha.item()):
            return f"alpha {alpha.item():g} in the file"
        return super().shape_mismatch(tensors)

    @torch.no_grad()
    def load_adapter_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the matrices; where the file has another alpha, the up matrix makes up for the difference."""
        super().load_adapter_state(tensors)
        factor = self._meant(tensors["alpha"].item()) / self.alpha
        if factor != 1:
            self.lora_up.mul_(factor)

    def _meant(self, alpha: float) -> float:
        """An alpha as it was before a file's number format rounded it, if it is one of this adapter's own."""
        own = [near for near in (self.alpha, self.file_alpha) if math.isclose(alpha, near, rel_tol=_ALPHA_TOLERANCE)]
        return min(own, key=lambda near: abs(near - alpha), default=alpha)


@frozen
class LRFactors:
    """How learning rates vary over a network."""

    blocks: Sequence[float] = ()
    """Multiplies the learning rate in each numbered block; with none, the denoiser is one parameter group."""
    denoiser_up: float | None = None
    """Multiplies the learning rate of the denoiser's up matrices: LoRA+ (Hayou et al., 2024, arXiv:2402.12354)."""
    text_encoder_up: float | None = None
    """The same for text encoders."""


class LoRANetwork(Network):
    """LoRA adapters, with dropout, and learning rates that may vary."""

    def __init__(
        self,
        targets: Sequence[AdaptationTarget],
        make: Callable[[AdaptationTarget], LoRAModule | None],
        rates: DropoutRates,
        lr_factors: LRFactors = LRFactors(),
        max_norm: float | None = None,
    ) -> None:
        """Make the adapters; `make` returns None for a layer that gets none.

        `max_norm` is the largest norm that updates may have after a step.
        """
        super().__init__(targets, make)
        self._lr_factors = lr_factors
        adapters = [adapter for adapter in self.adapters if isinstance(adapter, LoRAModule)]
        factors = [(adapter.lora_up, adapter.lora_down, adapter.scale) for adapter in adapters]
        self._max_norm = MaxNorm(factors, max_norm) if max_norm else None
        self._dropouts: NetworkDropout | None = None
        if rates:
            rank = max(adapter.rank for adapter in adapters)
            self._dropouts = NetworkDropout(rates, [adapter.key for adapter in adapters], rank)
            for adapter, dropout in zip(adapters, self._dropouts.adapters, strict=True):
                adapter.use_dropout(dropout, rates)

    def group_of(self, target: AdaptationTarget, parameter_name: str) -> tuple[str, float]:
        """Blocks and up matrices with other learning rates than the rest of their part are separate groups."""
        name, factor = super().group_of(target, parameter_name)
        blocks, block = self._lr_factors.blocks, target.block_index
        up = self._lr_factors.denoiser_up if target.encoder_index is None else self._lr_factors.text_encoder_up
        if blocks and block is not None:
            name, factor = f"{name}_block{block}", factor * blocks[block]
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

    def begin_batch(self, sample_seeds: Tensor) -> None:
        """Draw the micro-batch's dropouts from its images' seeds, int64 [B]."""
        if self._dropouts is not None:
            device = next(self.adapters.parameters()).device
            self._dropouts.begin_batch(sample_seeds.to(device))

    def on_optimizer_step(self) -> Mapping[str, Tensor]:
        """Scale down updates beyond the largest norm; returns the norms for logs."""
        return self._max_norm.apply() if self._max_norm else {}
