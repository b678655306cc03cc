"""Memory of each phase of a run, counted by running its code with fake tensors.

B images in a micro-batch or encoded together, H and W image sides in pixels.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lorakit.api.components import DENOISER_LR, TEXT_ENCODER_LR, OptimizerConfig
from lorakit.config.memory_presets import memory_presets, saving_keys, to_toml
from lorakit.config.train_config import AUTOTUNE_KEYS, UNIFIED_MEMORY_DEVICES, TrainConfig, TrainingSection
from lorakit.data.batch_sampler import buckets
from lorakit.data.cache.encode import CAPTIONS_AT_ONCE
from lorakit.data.cache.vae import encode_pixels
from lorakit.data.loader import Batch
from lorakit.models.conditioning import EncodesOneByOne, encode_frozen
from lorakit.models.interfaces import DiffusionModel
from lorakit.models.memory.block_swap import streamed_bytes
from lorakit.networks.network import Network, ParameterGroup
from lorakit.planning.dummy_batches import CPU, longest_caption
from lorakit.planning.memory_tracker import MemoryTracker, fake_tensors
from lorakit.training.encode import conditioning_of
from lorakit.training.prepare import PreparedRun
from lorakit.training.setup import attach_network, load_model
from lorakit.training.step.cuda_graphs import MAX_SHAPES
from lorakit.training.step.eval_weights import begin_training
from lorakit.training.step.loss import Criterion, denoising_loss

RESERVE = 2**30
"""Bytes to leave free for the device's driver, a desktop, and the libraries that kernels are from."""


def with_reserve(peak: int) -> int:
    """The bytes of a device on which `peak` bytes are found: a tenth more is lost to fragmentation."""
    return peak + peak // 10 + RESERVE


@frozen(kw_only=True)
class EncodingMemory:
    """Memory for encoding, in bytes."""

    weights: int
    """Weights of the encoder."""
    transient: int
    """Peak of everything else."""

    @property
    def peak(self) -> int:
        """The sum."""
        return self.weights + self.transient


@frozen(kw_only=True)
class TrainingMemory:
    """Memory for training, in bytes."""

    weights: int
    """Weights of the base model that are needed during training and on the device."""
    adapters: int
    """The adapters, and their average over the steps where there is one."""
    gradients: int
    """Their gradients."""
    optimizer: int
    """The state of the optimizer."""
    saved_activations: int
    """Activations saved for the backward pass."""
    transient: int
    """Peak of temporary tensors; some saved activations may be freed by then."""
    encoding: int
    """Memory for encoding images during training."""
    graphs: int = 0
    """What CUDA graphs hold while other steps run."""

    @property
    def trained(self) -> int:
        """Adapters, gradients and the optimizer's state."""
        return self.adapters + self.gradients + self.optimizer

    @property
    def activations(self) -> int:
        """Memory allocated and freed in each step."""
        return self.saved_activations + self.transient + self.encoding

    @property
    def peak(self) -> int:
        """The sum."""
        return self.weights + self.trained + self.activations + self.graphs


def as_cpu_run(prepared: PreparedRun) -> PreparedRun:
    """The run on a CPU in eager mode; its kernels save the same activations as those of other devices."""
    config = prepared.config
    plain: dict[str, Any] = {"device": "cpu", **dict.fromkeys(AUTOTUNE_KEYS, False)}
    return evolve(prepared, config=evolve(config, training=evolve(config.training, **plain)))


def image_encoding_memory(prepared: PreparedRun) -> EncodingMemory:
    """Memory for encoding images of the largest size."""
    config = prepared.config
    examples = [own for dataset in (*prepared.datasets, *prepared.validation) for own in dataset.examples]
    width, height = max((own.placement.bucket for own in examples), key=lambda size: size[0] * size[1])
    model = load_model(config, CPU)
    with fake_tensors() as meter:
        encoder, weights = model.vae_encoder, _settled(meter)
        images = config.data.encode_batch_size or 1  # more only where there is room for them
        encode_pixels(torch.empty(images, height, width, 3, dtype=torch.uint8), encoder)
        return EncodingMemory(weights=weights, transient=meter.peak - weights)


def caption_encoding_memory(prepared: PreparedRun) -> int:
    """Bytes for encoding a batch of captions, the weights of the text encoders that are in memory together included."""
    config, captions = prepared.config, [longest_caption(prepared)] * CAPTIONS_AT_ONCE
    model = load_model(config, CPU)
    with fake_tensors() as meter:
        with meter.peak_of_forward_passes():
            for _ in encode_frozen(model, [captions], config.data.weighted_captions):
                pass
        peak = meter.peak
        offloaded = [_offloaded(model, [part.name], config) for part in config.model.parts if part.encoders]
    return peak - (max(offloaded) if isinstance(model, EncodesOneByOne) else sum(offloaded))


def training_memory(
    prepared: PreparedRun,
    batch: Batch,
    encoding: EncodingMemory,
    tensors: Callable[[], AbstractContextManager[MemoryTracker]] = fake_tensors,
) -> TrainingMemory:
    """Memory for steps on a micro-batch; `encoding` is that for encoding images.

    With `MemoryTracker` for `tensors` they are real, and the result is measured instead of estimated.
    """
    config = prepared.config
    model = load_model(config, CPU)
    with tensors() as meter:
        # What is in memory while the network trains; the parts are loaded when they are first asked for.
        loaded: list[object] = [model.denoiser]
        loaded += [model.text_encoder] if prepared.encodes_captions else []
        loaded += [model.vae_encoder] if prepared.encodes_images else []
        frozen_weights = _settled(meter)
        offloaded = _offloaded(model, prepared.parts_in_memory, config)
        network, flat = attach_network(model, config)
        standing = _settled(meter)
        # With selective checkpointing, the blocks are chosen in the first step, so memory is steady in the second.
        for _ in range(1 if isinstance(config.training.gradient_checkpointing, bool) else 2):
            saved = _step(model, network, batch, config, meter)
        transient = meter.peak - standing - saved
    trained = [tuple(p.shape) for group in flat.groups_for(config.optimizer) for p in group.parameters]
    average = 0 if config.network.ema is None else flat.weights.nbytes
    return TrainingMemory(
        weights=frozen_weights - offloaded,
        adapters=standing - frozen_weights - flat.gradients.nbytes + average,
        gradients=flat.gradients.nbytes,
        optimizer=state_bytes(config.optimizer, trained),
        saved_activations=saved,
        transient=transient,
        encoding=encoding.transient if prepared.encodes_images else 0,
    )


def _offloaded(model: DiffusionModel, parts: Sequence[str], config: TrainConfig) -> int:
    """Bytes of the loaded weights of these parts that are offloaded."""
    streamed = [part for part in parts if part in config.training.stream_base]
    return streamed_bytes(target.module for target in model.targets(streamed))


_LARGE = 2**20
"""Numbers in a parameter that takes a while to update."""


def _settled(meter: MemoryTracker) -> int:
    """Bytes currently held; resets the peak to them."""
    meter.peak = meter.held
    return meter.held


def state_bytes(config: OptimizerConfig, shapes: Sequence[tuple[int, ...]]) -> int:
    """Bytes of the state that an optimizer keeps of parameters of these shapes.

    It takes a step with one parameter of each shape, on the CPU. Where each number counts for itself, two small ones
    say how many bytes a number takes.
    """
    if config.elementwise and math.prod(max(shapes, key=math.prod)) > _LARGE:
        half, whole = (state_bytes(config, [(size,)]) for size in (_LARGE // 2, _LARGE))
        numbers = sum(map(math.prod, shapes))
        return whole + (whole - half) * (numbers - _LARGE) // (_LARGE // 2)
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
        for tensor in tree_leaves(dict(optimizer.state[parameter])):
            if isinstance(tensor, Tensor):
                key = tensor.untyped_storage()._cdata
                sizes[key] = tensor.untyped_storage().nbytes()
                owners[key].append(shape)
    # What several have in common is there once.
    return sum(sizes[key] * (counts[own[0]] if len(own) == 1 else 1) for key, own in owners.items())


def _step(model: DiffusionModel, network: Network, batch: Batch, config: TrainConfig, meter: MemoryTracker) -> int:
    """Forward and backward pass of a micro-batch; returns the bytes of saved activations."""
    before = meter.held
    network.begin_batch(batch.sample_seeds)
    conditioning = conditioning_of(batch, model, config.trains_text_encoders)
    loss = denoising_loss(model, batch, conditioning, Criterion.of(config.loss, model.noise))
    kept = meter.held - before
    torch.autograd.backward(loss)
    return kept


@frozen
class MemoryPreset:
    """Settings, and the memory that training needs with them."""

    training: TrainingSection
    """All of `[training]`."""
    memory: TrainingMemory
    is_config: bool
    """Whether these are the settings of the config."""

    @property
    def keys(self) -> dict[str, object]:
        """The keys that save memory, with their values."""
        return saving_keys(self.training)

    def fits(self, memory: int) -> bool:
        """Whether training is expected to fit into `memory` bytes."""
        return with_reserve(self.memory.peak) <= memory

    def __str__(self) -> str:
        return ", ".join(to_toml(self.keys)) or "none of them"


def estimate_presets(prepared: PreparedRun, batch: Batch, encoding: EncodingMemory) -> Iterator[MemoryPreset]:
    """The presets from the fastest to the smallest; the config's settings come first if they are not a preset."""
    current = prepared.config.training
    presets = list(memory_presets(current, prepared.parts_in_memory))
    for training in presets if current in presets else [current, *presets]:
        config = evolve(prepared.config, training=training)
        memory = training_memory(as_cpu_run(evolve(prepared, config=config)), batch, encoding)
        if _has_steps_beside_graphs(prepared, training):
            memory = evolve(memory, graphs=memory.saved_activations + memory.transient)
        yield MemoryPreset(training, memory, is_config=training == current)


def _has_steps_beside_graphs(prepared: PreparedRun, training: TrainingSection) -> bool:
    """Whether graphs hold the memory of their activations while steps of other shapes need that of theirs.

    All graphs share one memory pool, in which they also warm up, the largest shape first. So they need no more memory
    than eager steps, unless there are more shapes than `MAX_SHAPES`.
    """
    is_on = training.cuda_graphs is True or (training.cuda_graphs == "auto" and not training.excludes_graphs)
    if not is_on or training.device in UNIFIED_MEMORY_DEVICES:
        return False
    sizes = {
        (images, bucket.size)
        for bucket in buckets(prepared.datasets)
        for images in {min(bucket.batch_size, bucket.appearances), bucket.appearances % bucket.batch_size} - {0}
    }
    return len(sizes) > MAX_SHAPES
