"""Plans for Stable Diffusion XL: two text encoders, pooled captions and image sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve

from lorakit.config.memory_presets import memory_presets, saving_keys
from lorakit.config.train_config import TrainConfig
from lorakit.data.cache.encode import CAPTIONS_AT_ONCE
from lorakit.models.families.sd.unet import UNet
from lorakit.models.families.sd.unet_config import UNetConfig
from lorakit.models.families.sdxl.model import StableDiffusionXL
from lorakit.models.weights.load import without_weights
from lorakit.planning.dummy_batches import BatchShape
from lorakit.planning.estimate import caption_encoding_memory, training_memory
from lorakit.planning.memory_tracker import MemoryTracker, fake_tensors
from lorakit.testing.models import FULL_SDXL
from lorakit.training.prepare import prepare
from lorakit.training.setup import load_model
from tests.planning.test_memory import CPU, NO_IMAGES, UNET, estimate, example, given_in, tensors_of

ENCODERS = ("text_encoder", "text_encoder_2")


@pytest.fixture
def config(make_config, tiny_sdxl_file: Path) -> Callable[..., TrainConfig]:
    """A function from sections to the config of a run on it."""
    return lambda **sections: make_config(model={"path": str(tiny_sdxl_file)}, **sections)


REAL: Mapping[str, Mapping[str, Any]] = {
    "everything, recomputed": {"training": {"gradient_checkpointing": True}},
    "first text encoder, streamed": {
        "optimizer": {"text_encoder_lr": [1e-5, 0.0]},
        "training": {"gradient_checkpointing": True, "stream_base": ["unet", *ENCODERS]},
    },
}


@pytest.mark.usefixtures("lorakit_one_thread")
@pytest.mark.parametrize("sections", REAL.values(), ids=REAL)
def test_fake_tensors_take_what_real_ones_take(config, sections: Any) -> None:
    """Weights, adapters and gradients to the byte, temporary tensors within a hundredth."""
    prepared = prepare(config(**sections))
    shape = BatchShape(1, (64, 64))
    batch = example(prepared, shape)
    real, found = training_memory(prepared, batch, NO_IMAGES, MemoryTracker), estimate(prepared, shape)
    assert evolve(real, saved_activations=found.saved_activations, transient=found.transient) == found
    assert real.transient == pytest.approx(found.transient, rel=0.01)
    table = 3 * 4 * load_model(prepared.config, CPU).noise.spec.num_timesteps
    most = sum(tensor.nbytes for tensor in given_in(batch)) + table
    assert 0 <= real.saved_activations - found.saved_activations <= most


def test_made_up_batches_have_sizes_and_pooled_captions(config) -> None:
    """They have all that the U-Net is told of, in its shape."""
    batch = example(prepare(config(network=UNET)), BatchShape(3, (96, 64)))
    assert batch.conditioning is not None
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.conditioning.items()}
    assert shapes == {"hidden_states": (3, 77, 64), "text_embeds": (3, 32)}
    assert batch.image_conditioning is not None
    assert batch.image_conditioning["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]] * 3


def test_both_text_encoders_are_counted(config) -> None:
    """Captions are encoded by one after the other; presets name both where they are in memory during training."""
    alone, all_parts = prepare(config(network=UNET)), prepare(config())
    model = load_model(alone.config, CPU)
    with fake_tensors() as meter, torch.no_grad():
        encoder = model.text_encoder
        encoder.encode(encoder.tokenize([""] * CAPTIONS_AT_ONCE))
        both = meter.peak
    first, second = (sum(tensor.nbytes for tensor in tensors_of([model.module(name)])) for name in ENCODERS)
    assert second < caption_encoding_memory(alone) < both - 0.9 * first
    assert alone.parts_in_memory == ("unet",)
    assert all_parts.parts_in_memory == ("unet", *ENCODERS)
    keys = [saving_keys(own) for own in memory_presets(all_parts.config.training, all_parts.parts_in_memory)]
    assert {"gradient_checkpointing": True, "nf4_base": ("unet", *ENCODERS)} in keys


def test_streamed_blocks_are_small() -> None:
    """A transformer with ten blocks is streamed block by block, in the full-size U-Net as well."""
    unet = without_weights(lambda: UNet(UNetConfig.of(FULL_SDXL["unet"])))
    blocks = StableDiffusionXL.modules[-1].blocks(unet)
    sizes = [sum(math.prod(layer.get_parameter("weight").shape) for layer in layers) for layers in blocks]
    assert sum(sizes) > 2.5e9
    assert max(sizes) < sum(sizes) / 50
