"""Plans for flow-matching families: transformers, and text encoders of which one is in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from torch import nn

from lorakit.models.families.anima.model import Anima
from lorakit.models.families.anima.structure import TransformerConfig
from lorakit.models.families.anima.transformer import Transformer
from lorakit.models.families.flux1.model import Chroma, Flux
from lorakit.models.families.flux1.settings import FluxSettings
from lorakit.models.families.flux1.transformer import FluxTransformer
from lorakit.models.families.z_image.model import ZImage
from lorakit.models.families.z_image.transformer import ZImageSettings, ZImageTransformer
from lorakit.models.weights.load import without_weights
from lorakit.planning.dummy_batches import BatchShape
from lorakit.planning.estimate import training_memory
from lorakit.planning.memory_tracker import MemoryTracker
from lorakit.training.prepare import prepare
from tests.conftest import FLOW_MAKERS
from tests.planning.test_memory import NO_IMAGES, estimate, example, given_in

SETTINGS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "bf16, int8, checkpoints": {
        "mixed_precision": "bf16", "int8_base": ["transformer"], "gradient_checkpointing": True,
    },
    "bf16, streamed, checkpoints": {
        "mixed_precision": "bf16", "stream_base": ["transformer"], "gradient_checkpointing": True,
    },
}  # fmt: skip


@pytest.mark.usefixtures("lorakit_one_thread")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FLOW_MAKERS)
def test_fake_tensors_take_what_real_ones_take(
    make_config: Any, tiny_flow: Callable[[str], Path], family: str, setting: str
) -> None:
    """Weights, adapters and gradients to the byte, temporary tensors within a hundredth."""
    config = make_config(model={"path": str(tiny_flow(family))}, training=SETTINGS[setting])
    prepared, shape = prepare(config), BatchShape(1, (64, 64))
    batch = example(prepared, shape)
    real, found = training_memory(prepared, batch, NO_IMAGES, MemoryTracker), estimate(prepared, shape)
    assert evolve(real, saved_activations=found.saved_activations, transient=found.transient) == found
    assert real.transient == pytest.approx(found.transient, rel=0.01)
    assert 0 <= real.saved_activations - found.saved_activations <= sum(tensor.nbytes for tensor in given_in(batch))


FULL: Mapping[str, tuple[Any, Callable[[], nn.Module], float]] = {
    "flux1": (Flux, lambda: FluxTransformer(FluxSettings(guidance_embeds=True)), 22.17),
    "chroma": (Chroma, lambda: FluxTransformer(FluxSettings(approximator_num_channels=64)), 16.58),
    "z_image": (ZImage, lambda: ZImageTransformer(ZImageSettings()), 11.46),
    "anima": (Anima, lambda: Transformer(TransformerConfig()), 3.64),
}
"""The model, its transformer in full size, and the GiB that this takes in bf16."""


@pytest.mark.parametrize("family", FULL)
def test_streamed_blocks_are_small(family: str) -> None:
    """Nearly all of a transformer is streamed, block by block, and the rest stays where it is."""
    model, make, size = FULL[family]
    transformer = without_weights(make)
    whole = sum(parameter.numel() for parameter in transformer.parameters())
    assert 2 * whole / 2**30 == pytest.approx(size, abs=0.006)
    blocks = model.modules[-1].blocks(transformer)
    sizes = [sum(math.prod(layer.get_parameter("weight").shape) for layer in layers) for layers in blocks]
    assert sum(sizes) > 0.94 * whole
    assert max(sizes) < 0.04 * whole
