"""What adapters of q, k and v would gain by one down-projection of the input that they share.

    python benchmarks/shared_projection.py

Times one thread's products of all self-attention layers of Stable Diffusion 1.5 at 256 px, batch 1, rank 16: the frozen
layers alone, with adapters that each project for themselves, and with the three factors put together. The best of many
rounds, in which the three take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

RANK, ROUNDS = 16, 20
LAYERS = ((1024, 320, 5), (256, 640, 5), (64, 1280, 5), (16, 1280, 1))
"""Positions, channels, and how many attention layers have them."""


class Projections:
    """q, k and v of one attention layer, with adapters, forwards and backwards."""

    def __init__(self, positions: int, channels: int, dtype: torch.dtype) -> None:
        """Random weights; factors are float32, as in training."""
        self.x = torch.randn(positions, channels, dtype=dtype)
        self.weights = [torch.randn(channels, channels, dtype=dtype) for _ in range(3)]
        self.downs = [torch.randn(RANK, channels) for _ in range(3)]
        self.ups = [torch.randn(channels, RANK, dtype=dtype) for _ in range(3)]
        self.grads = [torch.randn(positions, channels, dtype=dtype) for _ in range(3)]

    def frozen(self) -> Tensor:
        """No adapters: outputs, and the gradient of the input."""
        for weight in self.weights:
            self.x @ weight.t()
        return self._summed([grad @ weight for grad, weight in zip(self.grads, self.weights, strict=True)])

    def apart(self) -> Tensor:
        """Each adapter projects the input, and adds to its gradient."""
        x, parts = self.x, []
        downs = [down.to(x.dtype) for down in self.downs]
        for weight, down, up, grad in zip(self.weights, downs, self.ups, self.grads, strict=True):
            hidden = x @ down.t()
            (x @ weight.t()).addmm_(hidden, up.t())
            grad_hidden = grad @ up
            grad.t() @ hidden, grad_hidden.t() @ x  # of both factors
            parts.append((grad @ weight).addmm_(grad_hidden, down))
        return self._summed(parts)

    def shared(self) -> Tensor:
        """One product with all three factors, forwards and backwards."""
        x, downs = self.x, torch.cat(self.downs).to(self.x.dtype)
        hidden, grad_hidden = x @ downs.t(), x.new_empty(len(x), 3 * RANK)
        grad_x = torch.zeros_like(x)
        rows = zip(self.weights, self.ups, self.grads, hidden.split(RANK, 1), grad_hidden.split(RANK, 1), strict=True)
        for weight, up, grad, own, own_grad in rows:
            (x @ weight.t()).addmm_(own, up.t())
            own_grad.copy_(grad @ up)
            grad.t() @ own  # of the up factor
            grad_x.addmm_(grad, weight)
        grad_hidden.t() @ x  # of the down factors
        return grad_x.addmm_(grad_hidden, downs)

    @staticmethod
    def _summed(parts: list[Tensor]) -> Tensor:
        return parts[0] + parts[1] + parts[2]


def best_of_each(ways: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Seconds of each way, the best of all rounds."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    """Print milliseconds of a step for each way."""
    torch.set_num_threads(1)
    print("| precision | frozen | each for itself | shared |\n|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        totals = [0.0, 0.0, 0.0]
        for positions, channels, count in LAYERS:
            layer = Projections(positions, channels, dtype)
            times = best_of_each({"frozen": layer.frozen, "apart": layer.apart, "shared": layer.shared})
            totals = [total + count * seconds for total, seconds in zip(totals, times.values(), strict=True)]
        print(f"| {dtype} | " + " | ".join(f"{1000 * total:.1f} ms" for total in totals) + " |", flush=True)


if __name__ == "__main__":
    main()
