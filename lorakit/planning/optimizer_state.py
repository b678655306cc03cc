"""How much an optimizer keeps, seen from a step that it takes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lorakit.api.components import DENOISER_LR, TEXT_ENCODER_LR, OptimizerConfig
from lorakit.networks.network import ParameterGroup
from lorakit.training.step.eval_weights import begin_training


def state_bytes(config: OptimizerConfig, shapes: Sequence[tuple[int, ...]]) -> int:
    """Bytes of the state that an optimizer keeps of parameters of these shapes.

    It takes a step with one parameter of each shape, on the CPU.
    """
    counts = Counter(shapes)
    samples = {shape: nn.Parameter(torch.zeros(shape)) for shape in counts}
    for parameter in samples.values():
        parameter.grad = torch.full_like(parameter, 1e-3)
    rate = max(max(config.lrs_from(key)) for key in (DENOISER_LR, TEXT_ENCODER_LR))
    optimizer = config.build([ParameterGroup("sample", "sample", tuple(samples.values()), rate)])
    begin_training(optimizer)
    optimizer.step()
    sizes: dict[int, int] = {}
    owners: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
    for shape, parameter in samples.items():
        for tensor in _tensors(optimizer.state[parameter]):
            key = tensor.untyped_storage()._cdata
            sizes[key] = tensor.untyped_storage().nbytes()
            owners[key].append(shape)
    # What several have in common is there once.
    return sum(sizes[key] * (counts[own[0]] if len(own) == 1 else 1) for key, own in owners.items())


def _tensors(state: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(dict(state)) if isinstance(leaf, Tensor))
