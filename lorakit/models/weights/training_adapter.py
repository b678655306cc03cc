"""A LoRA file that is part of the base model while it trains, and taken back where pictures are drawn.

Such files undo the distillation of models that draw in few steps, so that training does not destroy it; the LoRA that
is trained is then used on the distilled model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lorakit.models.weights.load import open_tensors
from lorakit.models.weights.merge_lora import MergedFile


@contextmanager
def taken_back(file: MergedFile, root: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Subtract a merged LoRA file's share from the outputs of the denoiser's layers; afterwards they are as before.

    Weights stay what they are, also where they are quantized or swapped.
    """
    read = open_tensors(file.path)
    hooks = []
    try:
        for target in file.targets:
            if target.encoder_index is None and file.adapts(target.key):
                up, down = (own.to(device, dtype) for own in file.factors(target.key, read))
                hooks.append(root.get_submodule(target.path).register_forward_hook(partial(_without, up, down)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _without(up: Tensor, down: Tensor, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The output [.., O] of a linear layer less U·D·x, for factors [O, r], scaled, and [r, I]."""
    return output - F.linear(F.linear(inputs[0], down), up)
