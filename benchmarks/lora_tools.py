"""How long merging, resizing and extracting take, beside a plain loop of the same formulas.

    python benchmarks/lora_tools.py
    python benchmarks/lora_tools.py --model sdxl --layers 60

The loop forms ΔW of each layer and takes the SVD of the full matrix, as scripts for LoRA files usually do. Both compute
the same in float32 on the CPU, from tensors in memory, and the errors of both results are compared. Layers are chosen
evenly from those that LoRA-C3Lier adapts in the full-size model, in its shapes, with random numbers.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lorakit.lora_tools.low_rank import concatenated, decompose_product, leading
from lorakit.models.families.sd.targets import block_layers
from lorakit.models.families.sd.unet import UNet
from lorakit.models.families.sd.unet_config import UNetConfig
from lorakit.models.weights.load import without_weights
from lorakit.testing.models import FULL_SD1, FULL_SDXL

Factors = tuple[Tensor, Tensor]
Approximation = tuple[Tensor, Tensor]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--layers", type=int, default=40, help="how many layers are measured")
    parser.add_argument("--rank", type=int, default=32, help="rank of the files")
    parser.add_argument("--new-rank", type=int, default=8, help="rank of the results")
    arguments = parser.parse_args()
    shapes, rank, new = layer_shapes(arguments.model, arguments.layers), arguments.rank, arguments.new_rank
    pairs = [
        (factors(shape, rank, 2 * index), factors(shape, rank, 2 * index + 1)) for index, shape in enumerate(shapes)
    ]
    changes = [nearly_low_rank(shape, rank, index) for index, shape in enumerate(shapes)]
    singles = [one for one, _ in pairs]
    print(f"{len(shapes)} layers of {arguments.model}, rank {rank} to {new}, {torch.get_num_threads()} threads\n")
    print("| operation | lorakit (s) | plain loop (s) | ratio | largest difference of errors |\n|---|---|---|---|---|")
    row(
        "resize",
        [one[0] @ one[1] for one in singles],
        lambda i: resized(singles[i], new),
        lambda i: full(singles[i], new),
    )
    sums = [one[0] @ one[1] + other[0] @ other[1] for one, other in pairs]
    row("merge at a rank", sums, lambda i: merged(pairs[i], new), lambda i: full_sum(pairs[i], new))
    row("extract", changes, lambda i: leading(changes[i], new).factors(new), lambda i: svd(changes[i], new))


def layer_shapes(model: str, count: int) -> list[tuple[int, int]]:
    """Outputs and inputs of some layers of the U-Net, kernels flattened."""
    settings = {"sd15": FULL_SD1, "sdxl": FULL_SDXL}[model]["unet"]
    defaults = UNetConfig.of(settings)
    unet: nn.Module = without_weights(lambda: UNet(defaults))
    found = [(len(layer.weight), layer.weight[0].numel()) for _, layer in block_layers(unet)]
    step = max(len(found) / count, 1)
    return [found[int(index * step)] for index in range(min(count, len(found)))]


def factors(shape: tuple[int, int], rank: int, seed: int) -> Factors:
    """Random factors of an update of that shape."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], rank, generator=draw), torch.randn(rank, shape[1], generator=draw)


def nearly_low_rank(shape: tuple[int, int], rank: int, seed: int) -> Tensor:
    """A difference of weights: a low-rank update, and small numbers everywhere."""
    up, down = factors(shape, rank, seed)
    return up @ down + 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def resized(one: Factors, rank: int) -> Approximation:
    """An update at a lower rank, without its full matrix."""
    return decompose_product(*one).factors(rank)


def merged(pair: tuple[Factors, Factors], rank: int) -> Approximation:
    """The sum of two updates at a rank, without its full matrix."""
    return decompose_product(*concatenated((up, down, 1.0) for up, down in pair)).factors(rank)


def full(one: Factors, rank: int) -> Approximation:
    """An update at a lower rank by the SVD of its full matrix."""
    return svd(one[0] @ one[1], rank)


def full_sum(pair: tuple[Factors, Factors], rank: int) -> Approximation:
    """The sum of two updates at a rank by the SVD of its full matrix."""
    return svd(pair[0][0] @ pair[0][1] + pair[1][0] @ pair[1][1], rank)


def svd(matrix: Tensor, rank: int) -> Approximation:
    """The best approximation of a matrix by PyTorch's SVD."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank]


def row(
    name: str, exact: Sequence[Tensor], ours: Callable[[int], Approximation], plain: Callable[[int], Approximation]
) -> None:
    """Measure an operation on each layer, one way and the other in turn, and print its row."""
    seconds, difference = [0.0, 0.0], 0.0
    ours(0), plain(0)  # both have done something before they are measured
    for index, matrix in enumerate(exact):
        errors = []
        for way, compute in enumerate((ours, plain)):
            started = time.perf_counter()
            left, right = compute(index)
            seconds[way] += time.perf_counter() - started
            errors.append(float((left @ right - matrix).norm() / matrix.norm()))
        difference = max(difference, abs(errors[0] - errors[1]))
    ratio = seconds[1] / seconds[0] if seconds[0] else math.inf
    print(f"| {name} | {seconds[0]:.2f} | {seconds[1]:.2f} | {ratio:.1f} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
