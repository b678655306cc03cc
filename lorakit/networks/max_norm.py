"""Max-norm scaling of LoRA's updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

Factors = tuple[nn.Parameter, nn.Parameter, float]
"""Up and down factor of an adapter, and its scale, alpha/rank."""


def update_norms(up: Tensor, down: Tensor) -> Tensor:
    """Frobenius norms [n] of the products of up [n, O, r] and down matrices [n, r, I], without building these.

    ‖U·D‖² = Σ (UᵀU) ∘ (DDᵀ), and both of these are no larger than r×r.
    """
    squares = (up.mT @ up) * (down @ down.mT)
    return squares.sum((1, 2)).clamp(min=0).sqrt()


class MaxNorm:
    """Max-norm scaling: after each step, updates that have grown beyond a limit are scaled down to it.

    The update of a layer is scale·U·D, for a convolution as well, as U has 1×1 kernels. Shapes: n adapters of equal
    shape, r rank, I inputs (times the kernel's size) and O outputs.
    """

    def __init__(self, factors: Sequence[Factors], limit: float) -> None:
        """The limit is on each adapter's norm of (alpha/rank)·U·D."""
        shapes: dict[tuple[torch.Size, torch.Size], list[Factors]] = {}
        for up, down, scale in factors:
            shapes.setdefault((up.shape, down.shape), []).append((up, down, scale))
        # Adapters whose factors have the same shapes are computed with at once; scales are [n].
        self._alike = [(group, torch.tensor([scale for *_, scale in group])) for group in shapes.values()]
        self._limit = limit

    @torch.no_grad()
    def apply(self) -> Mapping[str, Tensor]:
        """Scale down updates beyond the limit, U and D by the same factor; returns metrics, scalars on the device."""
        found = []
        for index, (group, scales) in enumerate(self._alike):
            ups = [up.detach().flatten(1) for up, _, _ in group]
            downs = [down.detach().flatten(1) for _, down, _ in group]
            up, down = torch.stack(ups), torch.stack(downs)
            self._alike[index] = group, scales.to(up.device)
            before = update_norms(up, down) * self._alike[index][1]
            ratios = self._limit / before.clamp(min=self._limit)
            roots = ratios.sqrt()[:, None, None]
            torch._foreach_copy_(ups, list((up * roots).unbind()))
            torch._foreach_copy_(downs, list((down * roots).unbind()))
            found.append((before * ratios, ratios))
        norms, shares = (torch.cat(own) for own in zip(*found, strict=True))
        return {
            "max_norm/keys_scaled": (shares < 1).sum().float(),
            "max_norm/max_key_norm": norms.max(),
            "norm/avg_key_norm": norms.mean(),
        }
