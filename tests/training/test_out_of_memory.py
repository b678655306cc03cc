"""Runs that memory does not suffice for: what is told, what is saved, and what shows while they still go on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lorakit.api.observer import StepMetrics
from lorakit.config.memory_presets import memory_presets, next_preset, saving_keys
from lorakit.config.train_config import TrainingSection
from lorakit.errors import OutOfMemory
from lorakit.training.checkpoint.state import state_folder, states_in
from lorakit.training.loop import train
from lorakit.training.observers import Observers
from lorakit.training.prepare import prepare
from lorakit.training.run import Run
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.runtime.out_of_memory import MemoryPressureMonitor, memory_hint
from lorakit.training.setup import build_run

CPU = torch.device("cpu")
UNET = {"parts": ["unet"]}


class Hungry:
    """An attention backend that asks for more memory than any machine has, from one of the calls on."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention, or an error."""
        self.left -= 1
        if self.left < 0:
            torch.empty(2**60)
        return scaled_dot_product_attention(query, key, value)


def assembled(make_config: Any, **sections: Any) -> Run:
    """A run on the U-Net."""
    return build_run(prepare(make_config(network=UNET, **sections)), Distributed(CPU))


def test_a_step_that_memory_does_not_suffice_for(make_config) -> None:
    """The message has step, batch and what to change; the state after the last whole step goes on as if unharmed."""
    run = assembled(make_config, data={"batch_size": 2}, output={"name": "whole"})
    train(RunHandle(run))
    calls = 0

    def scale_weights(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return scaled_dot_product_attention(query, key, value)

    short = assembled(make_config, data={"batch_size": 2})
    short.model.use_attention(scale_weights)
    with torch.no_grad():
        batch = next(short.schedule.batches_from(0, short.loader))
        short.model.predict(batch.latents, batch.timesteps, short.encode(batch))
    short.model.use_attention(Hungry(2 * calls + 1))
    with pytest.raises(OutOfMemory) as caught:
        train(RunHandle(short))
    told = str(caught.value)
    assert told.startswith("Out of memory in step 3, with a batch of 2 images of 64x64. To need less, set ")
    first = (
        'To need less, set mixed_precision = "bf16" in [training], or set gradient_checkpointing = true in [training]'
    )
    assert f"{first}, or lower data.batch_size, or lower data.resolution" in told
    (state,) = states_in(state_folder(short.config))
    assert f"The state after step 2 is in {state}; run the same command with --resume" in told
    resumed = assembled(
        make_config, data={"batch_size": 2}, training={"gradient_checkpointing": 0.5}, output={"name": "resumed"}
    )
    handle = RunHandle(resumed)
    handle.load_state(state)
    train(handle)
    for key, tensor in run.network.adapter_state().items():
        torch.testing.assert_close(resumed.network.adapter_state()[key], tensor)


def test_nothing_is_saved_where_nothing_whole_is_new(make_config) -> None:
    """In the first step there is nothing to save, and in the middle of an update nothing that is whole."""
    run = assembled(make_config)
    run.model.use_attention(Hungry(1))
    with pytest.raises(OutOfMemory, match=r"^Out of memory in step 1, with a batch of 1 image of 64x64\. .* fits\.$"):
        train(RunHandle(run))
    run = assembled(make_config)
    run.optimizer.register_step_post_hook(lambda *_: torch.empty(2**60) if run.step == 2 else None)
    with pytest.raises(OutOfMemory, match=r"^Out of memory in step 3.* fits\.$"):
        train(RunHandle(run))
    assert not states_in(state_folder(run.config))


def test_a_backward_pass_that_fails_leaves_no_gradients(make_config) -> None:
    """What a backward pass had summed before memory ran out is not added to the gradients of the next one."""
    fails = True

    def refuse(_: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = scaled_dot_product_attention(query, key, value)
        if fails:
            found.register_hook(refuse)
        return found

    run, plain = (assembled(make_config, training={"mixed_precision": "bf16"}) for _ in range(2))
    run.model.use_attention(attention)
    batch = next(run.schedule.batches_from(0, run.loader))
    plain.forward_backward(batch)
    with pytest.raises(torch.OutOfMemoryError):
        run.forward_backward(batch)
    assert run.gradients.buffer.any()
    run.gradients.zero()
    fails = False
    run.forward_backward(batch)
    assert torch.equal(run.gradients.buffer, plain.gradients.buffer)


def test_other_errors_stay_what_they_are(make_config) -> None:
    """An error of another kind is not taken for lack of memory."""
    run = assembled(make_config)
    run.optimizer.register_step_post_hook(lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        train(RunHandle(run))


PRESETS = list(memory_presets(TrainingSection(device="cuda"), ("unet",)))


@pytest.mark.parametrize(
    ("own", "following"),
    [
        ({}, {"gradient_checkpointing": True}),
        ({"gradient_checkpointing": 0.25}, {"gradient_checkpointing": True}),
        ({"gradient_checkpointing": True}, {"gradient_checkpointing": True, "int8_base": ("unet",)}),
        ({"fp8_base": ("unet",)}, {"gradient_checkpointing": True, "int8_base": ("unet",)}),
        ({"stream_base": ("unet",)}, {"gradient_checkpointing": True, "stream_base": ("unet",)}),
    ],
)
def test_next_preset(own: Any, following: Any) -> None:
    """The next preset is the first that saves more in some way and less in none."""
    found = next_preset(evolve(TrainingSection(device="cuda"), **own), ("unet",))
    assert found is not None
    assert saving_keys(found) == following


def test_presets_lead_on_to_the_last() -> None:
    """Each preset but the last has a next one; on a device without its own memory, none offloads."""
    assert [next_preset(preset, ("unet",)) is None for preset in PRESETS] == [False] * 5 + [True]
    on_cpu = list(memory_presets(TrainingSection(device="cpu"), ("unet",)))
    assert on_cpu == [evolve(preset, device="cpu") for preset in PRESETS[:4]]
    assert next_preset(on_cpu[-1], ("unet",)) is None


def test_advice_after_the_last_preset(make_config) -> None:
    """Where no preset is left, what else helps is told, and what is set already is not told again."""
    nf4 = {"nf4_base": ["unet"], "gradient_checkpointing": True, "mixed_precision": "bf16"}
    assert memory_hint(assembled(make_config, training=nf4)) == "lower data.resolution; `lorakit plan` shows what fits"
    told = memory_hint(assembled(make_config, training={"int8_base": ["unet"], "gradient_checkpointing": True}))
    first = 'set mixed_precision = "bf16" in [training], or set '
    assert told.startswith(f'{first}nf4_base = ["unet"] and int8_base = [] in [training], or lower')


def test_advice_against_graphs(make_config) -> None:
    """Where micro-batches are replayed, doing without is among the ways to need less."""
    run = assembled(make_config)
    assert "cuda_graphs" not in memory_hint(run)
    run.uses_cuda_graphs = True
    assert ", or set cuda_graphs = false in [training], or lower" in memory_hint(run)


def metrics(step: int) -> StepMetrics:
    """Numbers of a step."""
    return StepMetrics(step=step, epoch=1, loss=1.0, gradient_norm=1.0)


def told_by(signs: Iterator[str], caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is told in ten steps."""
    observers = Observers()
    observers.add("memory", MemoryPressureMonitor(signs, lambda: "do less"))
    for step in range(1, 11):
        observers.notify("metrics_read", metrics(step))
    return [record.getMessage() for record in caplog.records if record.name == "lorakit.training.runtime.out_of_memory"]


def test_spilling_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """What shows again and again is told once, what shows twice is not."""

    def in_steps(*numbers: int) -> Iterator[str]:
        return iter(["memory is full" if step in numbers else "" for step in range(1, 11)])

    assert told_by(in_steps(2, 5), caplog) == []
    told = "step 7: memory is full, which slows every step down. To need less, do less"
    assert told_by(in_steps(2, 5, 7, 8, 9, 10), caplog) == [told]
