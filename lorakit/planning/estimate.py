"""What each phase of a run needs of memory, counted with imagined tensors by the code that the run executes.

B images in a micro-batch or encoded together, H and W image sides in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from attrs import evolve, frozen

from lorakit.config.train_config import AUTOTUNE_KEYS, TrainConfig
from lorakit.data.cache.encode import CAPTIONS_AT_ONCE
from lorakit.data.cache.vae import encode_pixels
from lorakit.data.loader import Batch
from lorakit.models.interfaces import DiffusionModel
from lorakit.models.memory.block_swap import streamed_bytes
from lorakit.networks.network import Network
from lorakit.planning.dummy_batches import CPU
from lorakit.planning.memory_tracker import MemoryTracker, fake_tensors
from lorakit.planning.optimizer_state import state_bytes
from lorakit.training.base_model import load_model
from lorakit.training.conditioning import conditioning_of
from lorakit.training.prepare import PreparedRun
from lorakit.training.setup import attach_network
from lorakit.training.step.gradients import FlatGradients
from lorakit.training.step.loss import denoising_loss


@frozen(kw_only=True)
class EncodingMemory:
    """What encoding needs, in bytes."""

    weights: int
    """Weights of the encoder."""
    passing: int
    """The most that there is at once beside them."""

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.passing


@frozen(kw_only=True)
class TrainingMemory:
    """What training needs, in bytes."""

    frozen: int
    """Weights of the base model, as far as it is still needed and on the device."""
    adapters: int
    """The adapters."""
    gradients: int
    """Their gradients."""
    optimizer: int
    """The state of the optimizer."""
    kept: int
    """What the forward pass keeps for the backward pass."""
    passing: int
    """The most that there is at once of other things; some of what is kept may be gone by then."""
    encoding: int
    """What images take that are encoded meanwhile."""

    @property
    def trained(self) -> int:
        """Adapters, gradients and the optimizer's state."""
        return self.adapters + self.gradients + self.optimizer

    @property
    def activations(self) -> int:
        """What comes and goes with each step."""
        return self.kept + self.passing + self.encoding

    @property
    def peak(self) -> int:
        """All of it."""
        return self.frozen + self.trained + self.activations


def as_cpu_run(prepared: PreparedRun) -> PreparedRun:
    """The run on a CPU, whose kernels keep what those of other devices keep, as it is without other modes."""
    config = prepared.config
    plain: dict[str, Any] = {"device": "cpu", **dict.fromkeys(AUTOTUNE_KEYS, False)}
    return evolve(prepared, config=evolve(config, training=evolve(config.training, **plain)))


def image_encoding_memory(prepared: PreparedRun) -> EncodingMemory:
    """What encoding images needs, those of the largest size."""
    config = prepared.config
    examples = [own for dataset in (*prepared.datasets, *prepared.validation) for own in dataset.examples]
    width, height = max((own.placement.bucket for own in examples), key=lambda size: size[0] * size[1])
    model = load_model(config, CPU)
    with fake_tensors() as meter:
        encoder, weights = model.vae_encoder, _settled(meter)
        encode_pixels(torch.empty(config.data.encode_batch_size, height, width, 3, dtype=torch.uint8), encoder)
        return EncodingMemory(weights=weights, passing=meter.peak - weights)


def caption_encoding_memory(prepared: PreparedRun) -> EncodingMemory:
    """What encoding captions needs, as many as are encoded together."""
    model = load_model(prepared.config, CPU)
    with fake_tensors() as meter, torch.no_grad():
        encoder, weights = model.text_encoder, _settled(meter)
        encoders = [part.name for part in prepared.config.model.parts if part.encoders]
        elsewhere = _elsewhere(model, encoders, prepared.config)
        encoder.encode(encoder.tokenize([""] * CAPTIONS_AT_ONCE, prepared.config.data.weighted_captions))
        return EncodingMemory(weights=weights - elsewhere, passing=meter.peak - weights)


def training_memory(
    prepared: PreparedRun,
    batch: Batch,
    encoding: EncodingMemory,
    tensors: Callable[[], AbstractContextManager[MemoryTracker]] = fake_tensors,
) -> TrainingMemory:
    """What steps on a micro-batch need; `encoding` is what encoding images needs.

    With `MemoryTracker` for `tensors` these are real, and what is counted is no estimate.
    """
    config = prepared.config
    model = load_model(config, CPU)
    with tensors() as meter:
        _needed(model, prepared)
        frozen_weights = _settled(meter)
        elsewhere = _elsewhere(model, prepared.parts_in_memory, config)
        network, groups = attach_network(model, config)
        adapters = _settled(meter) - frozen_weights
        FlatGradients(groups)
        standing = _settled(meter)
        for _ in range(_steps_to_settle(config)):
            kept = _step(model, network, batch, config, meter)
        passing = meter.peak - standing - kept
    return TrainingMemory(
        frozen=frozen_weights - elsewhere,
        adapters=adapters,
        gradients=standing - frozen_weights - adapters,
        optimizer=state_bytes(config.optimizer, [tuple(p.shape) for group in groups for p in group.parameters]),
        kept=kept,
        passing=passing,
        encoding=encoding.passing if prepared.encodes_images else 0,
    )


def _needed(model: DiffusionModel, prepared: PreparedRun) -> list[object]:
    """The parts that are in memory while the network trains; they are read."""
    encoders: list[object] = [model.text_encoder] if prepared.encodes_captions else []
    return [model.denoiser, *encoders, *([model.vae_encoder] if prepared.encodes_images else [])]


def _elsewhere(model: DiffusionModel, parts: Sequence[str], config: TrainConfig) -> int:
    """Bytes of the weights of these parts, which have been read, that are not on the device."""
    streamed = [part for part in parts if part in config.training.stream_base]
    return streamed_bytes(target.module for target in model.targets(streamed))


def _settled(meter: MemoryTracker) -> int:
    """Bytes that are held for longer; the peak is counted anew from here."""
    meter.peak = meter.held
    return meter.held


def _steps_to_settle(config: TrainConfig) -> int:
    """How many steps it takes until they need as much as all others: blocks that recompute are chosen in the first."""
    return 1 if isinstance(config.training.gradient_checkpointing, bool) else 2


def _step(model: DiffusionModel, network: Network, batch: Batch, config: TrainConfig, meter: MemoryTracker) -> int:
    """Forward and backward pass of a micro-batch; gives what the one keeps for the other."""
    before = meter.held
    conditioning = conditioning_of(batch, model, network, config.trains_text_encoders)
    loss = denoising_loss(model, batch, conditioning, config.loss)
    kept = meter.held - before
    torch.autograd.backward(loss)
    return kept
