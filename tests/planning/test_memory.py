"""Estimates of memory, compared with what real tensors of the same run take."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lorakit.data.loader import Batch
from lorakit.errors import PluginError
from lorakit.models.interfaces import DiffusionModel
from lorakit.planning.dummy_batches import BatchShape, Texts, make_batch
from lorakit.planning.estimate import (
    EncodingMemory,
    TrainingMemory,
    caption_encoding_memory,
    image_encoding_memory,
    state_bytes,
    training_memory,
)
from lorakit.planning.memory_tracker import MemoryTracker, fake_tensors
from lorakit.training.encode import conditioning_of
from lorakit.training.prepare import PreparedRun, prepare
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import attach_network, build_run, load_model
from lorakit.training.step.loss import Criterion, denoising_loss

CPU = torch.device("cpu")
NO_IMAGES = EncodingMemory(weights=0, transient=0)
SHAPE = BatchShape(2, (96, 64))
LOSS = 4
"""Bytes of the loss, which is there when the forward pass ends and is not kept for the backward pass."""

UNET = {"parts": ["unet"]}
SHARES: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "half": {"gradient_checkpointing": 0.5},
    "all": {"gradient_checkpointing": True},
}


def example(prepared: PreparedRun, shape: BatchShape = SHAPE) -> Batch:
    """A micro-batch of the run."""
    return make_batch(shape, Texts.of(prepared), load_model(prepared.config, CPU))


def estimate(prepared: PreparedRun, shape: BatchShape = SHAPE) -> TrainingMemory:
    """What training is said to need."""
    return training_memory(prepared, example(prepared, shape), NO_IMAGES)


def parts_of(model: DiffusionModel, prepared: PreparedRun) -> list[nn.Module]:
    """The parts of a real model that are there while the network trains."""
    return [model.denoiser, *([model.text_encoder.module] if prepared.encodes_captions else [])]


def tensors_of(modules: list[nn.Module]) -> list[Tensor]:
    """All parameters and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def given_in(batch: Batch) -> list[Tensor]:
    """The tensors of a batch."""
    named = (batch.conditioning, batch.tokens, batch.image_conditioning)
    conditions = [tensor for tensors in named for tensor in (tensors or {}).values()]
    return [batch.latents, batch.noise, batch.timesteps, batch.weights, batch.sample_seeds, *conditions]


def saved_by_autograd(prepared: PreparedRun) -> int:
    """Bytes that a real forward pass has saved when it ends, besides weights, adapters and the batch."""
    config, batch = prepared.config, example(prepared)
    model = load_model(config, CPU)
    network, _ = attach_network(model, config)
    known = {tensor.untyped_storage()._cdata for tensor in (*tensors_of(parts_of(model, prepared)), *given_in(batch))}
    for _ in range(2):  # blocks that recompute are chosen in the first step
        seen: dict[int, weakref.ref[Any]] = {}

        def note(tensor: Tensor, seen: dict[int, weakref.ref[Any]] = seen) -> Tensor:
            seen[tensor.untyped_storage()._cdata] = weakref.ref(tensor.untyped_storage())
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            network.begin_batch(batch.sample_seeds)
            conditioning = conditioning_of(batch, model, config.trains_text_encoders)
            loss = denoising_loss(model, batch, conditioning, Criterion.of(config.loss, model.noise))
        storages = [storage() for key, storage in seen.items() if key not in known]
        total = sum(storage.nbytes() for storage in storages if storage is not None)
        del storages
        loss.backward()
    return total


@pytest.mark.parametrize("training", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("network", ["lierla", "c3lier"])
def test_activations_are_those_of_a_real_step(make_config, network: str, precision: str, training: Any) -> None:
    """What is kept is what autograd has saved after a real forward pass, to the byte."""
    config = make_config(network={"name": network, **UNET}, training={"mixed_precision": precision, **training})
    prepared = prepare(config)
    assert estimate(prepared).saved_activations - LOSS == saved_by_autograd(prepared) > 100_000


REAL: Mapping[str, Mapping[str, Any]] = {
    "plain": {"network": UNET},
    "half": {"network": UNET, "training": SHARES["half"]},
    "text encoder, all": {"training": {"mixed_precision": "bf16", **SHARES["all"]}},
    "nf4 and int8": {"training": {"mixed_precision": "bf16", "nf4_base": ["unet"], "int8_base": ["text_encoder"]}},
    "streamed": {"training": {"mixed_precision": "bf16", "stream_base": ["unet"], **SHARES["all"]}},
    "dora and dropout": {"network": {"name": "c3lier", "dora": True, "dropout": 0.1, "rank_dropout": 0.1, **UNET}},
    "eager": {"network": UNET, "attention": {"name": "eager"}, "training": {"mixed_precision": "bf16"}},
}


@pytest.mark.parametrize("sections", REAL.values(), ids=REAL)
def test_imagined_tensors_take_what_real_ones_take(make_config, sections: Any) -> None:
    """What is told of training is what is counted with real weights and real steps.

    The batch and the table of noise levels count as kept only where all is real; what comes and goes may differ by a
    hundredth, all else by nothing.
    """
    prepared = prepare(make_config(**sections))
    batch = example(prepared)
    real, found = training_memory(prepared, batch, NO_IMAGES, MemoryTracker), estimate(prepared)
    assert evolve(real, saved_activations=found.saved_activations, transient=found.transient) == found
    assert real.transient == pytest.approx(found.transient, rel=0.01)
    table = 3 * 4 * load_model(prepared.config, CPU).noise.spec.num_timesteps
    assert (
        0
        <= real.saved_activations - found.saved_activations
        <= sum(tensor.nbytes for tensor in given_in(batch)) + table
    )


@pytest.mark.parametrize("form", [{}, {"int8_base": ["unet"]}, {"nf4_base": ["unet", "text_encoder"]}], ids=str)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_weights_are_as_large_as_the_real_ones(make_config, precision: str, form: Any) -> None:
    """Frozen weights, adapters and gradients are those of the assembled run, in whatever form."""
    prepared = prepare(make_config(training={"mixed_precision": precision, **form}))
    found = estimate(prepared)
    model = load_model(prepared.config, CPU)
    assert found.weights == sum(tensor.nbytes for tensor in tensors_of(parts_of(model, prepared)))
    _, flat = attach_network(model, prepared.config)
    trained = sum(parameter.nbytes for parameter in flat.parameters)
    assert found.gradients == trained
    # In a shorter format layers compute with a copy, and add their gradients up in it.
    assert found.adapters == (2 * trained if prepared.config.training.mixed_precision == "bf16" else trained)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion", "adafactor", "dadaptation", "sgdnesterov"])
def test_optimizer_state_is_that_of_a_real_run(make_config, name: str) -> None:
    """The state that is told is as large as that of the run's own optimizer after its first step."""
    rate = {"lr": 1.0} if name == "dadaptation" else {}
    config = make_config(optimizer={"name": name, **rate}, network={"name": "c3lier", "rank": 16, **UNET})
    run = build_run(prepare(config), Distributed(CPU))
    run.update(next(run.schedule.steps_from(0, iter(()))))
    states = (leaf for state in run.optimizer.state.values() for leaf in state.values() if isinstance(leaf, Tensor))
    storages = {leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes() for leaf in states}
    shapes = [tuple(parameter.shape) for group in run.optimizer.param_groups for parameter in group["params"]]
    assert state_bytes(config.optimizer, shapes) == sum(storages.values())


def test_encoding(make_config) -> None:
    """Encoders' weights are as large as the real ones, and more images at once take more beside them."""
    prepared = prepare(make_config(network=UNET))
    model = load_model(prepared.config, CPU)
    images, captions = image_encoding_memory(prepared), caption_encoding_memory(prepared)
    assert images.weights == sum(tensor.nbytes for tensor in tensors_of([model.vae_encoder.module]))
    text = sum(tensor.nbytes for tensor in tensors_of([model.text_encoder.module]))
    assert text < captions < 2 * text
    four = image_encoding_memory(prepare(make_config(network=UNET, data={"encode_batch_size": 4})))
    assert four.weights == images.weights
    assert 3.9 < four.transient / images.transient < 4.1


@pytest.mark.parametrize("keys", [{"int8_base": ["text_encoder"]}, {"nf4_base": ["text_encoder"]}])
def test_a_text_encoder_is_encoded_with_as_it_was_quantized(make_config, keys: dict[str, list[str]]) -> None:
    """What encoding captions needs is less by what quantization saves, though weights are read whole before that."""
    plain, small = (prepare(make_config(network=UNET, training=training)) for training in ({}, keys))
    before, after = (
        sum(tensor.nbytes for tensor in tensors_of([load_model(prepared.config, CPU).text_encoder.module]))
        for prepared in (plain, small)
    )
    saved = caption_encoding_memory(plain) - caption_encoding_memory(small)
    assert before - after > 0
    assert saved == pytest.approx(before - after, rel=0.1)


def test_images_that_vary_are_encoded_meanwhile(make_config) -> None:
    """The image encoder stays in memory while the network trains if images are encoded for each step."""
    still, varied = (prepare(make_config(network=UNET, data={"color_aug": vary})) for vary in (False, True))
    encoding = image_encoding_memory(varied)
    before = training_memory(still, example(still), encoding)
    after = training_memory(varied, example(varied), encoding)
    assert after.weights - before.weights == encoding.weights
    assert after.peak - before.peak == encoding.peak


def sizes_of(prepared: PreparedRun, shapes: list[BatchShape]) -> Iterator[int]:
    """What is kept for batches of these shapes."""
    return (estimate(prepared, shape).saved_activations for shape in shapes)


def test_larger_batches_take_more(make_config) -> None:
    """What is kept grows in proportion with the images, and with their size as well."""
    prepared = prepare(make_config(network=UNET))
    one, four, wide = sizes_of(prepared, [BatchShape(1, (64, 64)), BatchShape(4, (64, 64)), BatchShape(1, (256, 64))])
    assert four == pytest.approx(4 * one, rel=0.05)
    assert 2 * one < wide < four


def test_the_meter_forgets_what_is_gone() -> None:
    """Bytes are held for as long as a tensor is there, views do not count, and the peak stays."""
    with MemoryTracker() as meter:
        one = torch.zeros(100)
        two = one.view(10, 10).t()
        three = one + 1
        assert meter.held == 800
        del one, three
        assert meter.held == 400
        del two
    assert (meter.held, meter.peak) == (0, 800)


def test_imagined_tensors_have_no_memory() -> None:
    """A terabyte is counted and not taken; nothing that is imagined has overflowed, and its numbers are 1."""
    with fake_tensors() as meter:
        large = torch.zeros(2**38)
        assert meter.held == 2**40
        assert not (large > 1).any()
        assert large[0].item() == 1.0


def test_what_cannot_be_imagined() -> None:
    """Code whose course depends on numbers is said to be the reason, and by what operation."""
    with pytest.raises(PluginError, match=r"a component needs weights .*nonzero.* try the built-in"), fake_tensors():
        torch.ones(3).nonzero()


def test_attention_with_a_mask() -> None:
    """Masks may be given by place or by name, and allow numbers or be some."""
    with fake_tensors():
        query, mask = torch.empty(2, 4, 6, 16), torch.ones(2, 1, 1, 6, dtype=torch.bool)
        by_place = nn.functional.scaled_dot_product_attention(query, query, query, mask)
        by_name = nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=torch.zeros(2, 1, 1, 6))
    assert by_place.shape == by_name.shape == query.shape
