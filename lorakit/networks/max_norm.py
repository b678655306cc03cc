"""Max-norm scaling: updates that have grown beyond a limit are scaled back to it after each step.

The update of a layer is scale·U·D, for a convolution as well, as U has 1×1 kernels. Its norm is found without building
it: ‖U·D‖² = Σ (UᵀU) ∘ (DDᵀ), and both of these are no larger than rank×rank.

Shapes: n adapters of equal shape, r rank, I inputs (times the kernel's size) and O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lorakit.networks.lora import LoRAModule


def update_norms(up: Tensor, down: Tensor) -> Tensor:
    """Frobenius norms [n] of the products of up [n, O, r] and down factors [n, r, I]."""
    squares = (up.mT @ up) * (down @ down.mT)
    return squares.sum((1, 2)).clamp(min=0).sqrt()


class MaxNorm:
    """Keeps the norms of updates at or below a limit."""

    def __init__(self, adapters: Sequence[LoRAModule], limit: float) -> None:
        """The limit is on each adapter's norm of (alpha/rank)·U·D."""
        shapes: dict[tuple[torch.Size, torch.Size], list[LoRAModule]] = {}
        for adapter in adapters:
            shapes.setdefault((adapter.lora_up.shape, adapter.lora_down.shape), []).append(adapter)
        self._alike = [_ShapeGroup(group) for group in shapes.values()]
        self._limit = limit

    @torch.no_grad()
    def apply(self) -> Mapping[str, Tensor]:
        """Scale what is too large, half of it in each factor; gives numbers for logs, scalars on the device."""
        results = [alike.scale_down(self._limit) for alike in self._alike]
        norms = torch.cat([norms for norms, _ in results])
        ratios = torch.cat([ratios for _, ratios in results])
        return {
            "max_norm/keys_scaled": (ratios < 1).sum().float(),
            "max_norm/max_key_norm": norms.max(),
            "norm/avg_key_norm": norms.mean(),
        }


class _ShapeGroup:
    """Adapters whose factors have the same shapes, so that they are computed with at once."""

    def __init__(self, adapters: Sequence[LoRAModule]) -> None:
        self._adapters = adapters
        self._scales = torch.tensor([adapter.scale for adapter in adapters])  # [n]

    def scale_down(self, limit: float) -> tuple[Tensor, Tensor]:
        """Scale the factors of each adapter by the root of min(norm, limit) / norm.

        Gives the norms afterwards and these ratios, both [n].
        """
        ups = [adapter.lora_up.detach().flatten(1) for adapter in self._adapters]
        downs = [adapter.lora_down.detach().flatten(1) for adapter in self._adapters]
        up, down = torch.stack(ups), torch.stack(downs)
        self._scales = self._scales.to(up.device)
        norms = update_norms(up, down) * self._scales
        ratios = limit / norms.clamp(min=limit)
        roots = ratios.sqrt()[:, None, None]
        torch._foreach_copy_(ups, list((up * roots).unbind()))
        torch._foreach_copy_(downs, list((down * roots).unbind()))
        return norms * ratios, ratios
