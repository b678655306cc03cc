"""Modes that are chosen by a measurement: which, what is said, and that it leaves no trace."""

from __future__ import annotations

import logging
import math
import time

import pytest
import torch

import lorakit
from lorakit.data.loader import Batch
from lorakit.errors import ConfigError
from lorakit.training.prepare import prepare
from lorakit.training.run import Run
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.schedule import Schedule
from lorakit.training.setup import build_model, build_run
from lorakit.training.step.autotune import TIMED, Autotuner, compile_step, largest_latents, set_up_model
from lorakit.training.step.cuda_graphs import WARM_UPS
from tests.training.test_runs import same, weights_of

OPEN = {"cuda_graphs": "auto", "channels_last": "auto", "compile": "auto", "compile_backend": "eager"}
AT_ONCE = dict.fromkeys(("cuda_graphs", "channels_last", "compile"), 0.0)
"""Every mode is worth a trial."""

pytestmark = pytest.mark.usefixtures("lorakit_one_thread")


def run_of(make_config, **training: object) -> tuple[Run, Batch]:
    """A run at its first step, and its first micro-batch."""
    config = make_config(network={"parts": ["unet"], "dropout": 0.1}, training=training)
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    return run, next(run.schedule.batches_from(0, run.loader))


def channels_are_last(run: Run) -> bool:
    """Whether the denoiser's convolutions are kept so."""
    return run.model.denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def is_compiled(run: Run) -> bool:
    """Whether any block of the denoiser is."""
    return any(module._compiled_call_impl is not None for module in run.model.denoiser.modules())


def test_short_runs_measure_little(make_config, caplog: pytest.LogCaptureFixture) -> None:
    """A run that is over before a trial would pay trains as without, bit for bit, and says why."""
    caplog.set_level(logging.INFO, "lorakit")
    sections = {"network": {"parts": ["unet"]}, "training": {"max_steps": 2}}
    plain = weights_of(lorakit.train(make_config(**sections)))
    sections["training"] |= OPEN
    assert same(weights_of(lorakit.train(make_config(**sections, output={"name": "open"}))), plain)
    assert "cuda_graphs" not in caplog.text
    assert "training.compile is off: the run takes" in caplog.text


def test_measuring_leaves_no_trace(make_config) -> None:
    """After all modes were tried, loss and gradients are those of the one micro-batch; nothing else has moved."""
    plain, batch = run_of(make_config)
    plain.forward_backward(batch)
    run, batch = run_of(make_config, **OPEN)
    before, generator = run.network.adapter_state(), torch.get_rng_state()
    Autotuner(run, run.forward_backward, AT_ONCE)(batch)
    torch.testing.assert_close(run.gradients.buffer, plain.gradients.buffer, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(run.loss, plain.loss)
    assert run.loss > 0
    assert same(run.network.adapter_state(), before)
    assert not run.optimizer.state_dict()["state"]
    assert run.step == 0
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_is_taken(make_config, faster: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A mode in which a micro-batch takes less time is kept, one in which it takes more is undone; the log has both."""
    caplog.set_level(logging.INFO, "lorakit")
    run, batch = run_of(make_config, channels_last="auto")
    calls = []

    def learn(batch: Batch) -> None:
        calls.append(batch)
        time.sleep(0.01 if channels_are_last(run) == faster else 0.1)

    chosen = Autotuner(run, learn, AT_ONCE)
    chosen(batch)
    assert channels_are_last(run) == faster
    assert f"training.channels_last is {'on' if faster else 'off'}: " in caplog.text
    count = len(calls)
    chosen(batch)
    assert len(calls) == count + 1


def test_what_fails_is_dropped(make_config, caplog: pytest.LogCaptureFixture) -> None:
    """A compiler that fails is told of and switched off again, and what is learnt is what it would have been."""

    @torch._dynamo.register_backend(name="lorakit_broken")
    def broken(graph, inputs):
        raise RuntimeError("no kernel for this")

    caplog.set_level(logging.INFO, "lorakit")
    try:
        run, batch = run_of(make_config, compile="auto", compile_backend="lorakit_broken")
        Autotuner(run, run.forward_backward, AT_ONCE)(batch)
    finally:
        torch._dynamo.reset()
    assert "compile failed: BackendCompilerFailed: " in caplog.text
    assert "no kernel for this" in caplog.text
    assert not is_compiled(run)
    plain, batch = run_of(make_config)
    plain.forward_backward(batch)
    assert torch.equal(run.gradients.buffer, plain.gradients.buffer)


def test_what_is_certain_is_not_measured(make_config) -> None:
    """Keys that say true are set up with the model, and leave nothing to be measured."""
    run, _ = run_of(make_config, channels_last=True, compile=True, compile_backend="eager")
    assert channels_are_last(run)
    assert is_compiled(run)
    assert compile_step(run) == run.forward_backward
    set_up_model(run.model, (), "eager")
    assert not channels_are_last(run)
    assert not is_compiled(run)


def test_graphs_need_cuda(make_config) -> None:
    """Asking for CUDA graphs elsewhere is an error at its key, before anything is read; `auto` is none."""
    with pytest.raises(ConfigError, match=r"training\.cuda_graphs: needs CUDA, and this run is on cpu.*auto"):
        build_model(make_config(training={"cuda_graphs": True}), torch.device("cpu"))
    build_model(make_config(training={"cuda_graphs": "auto"}), torch.device("cpu"))


class OnCuda(Distributed):
    """A process of which the device is said to be a CUDA one, though it computes on the CPU."""

    def synchronize(self) -> None:
        """Nothing is to be waited for."""


@pytest.mark.parametrize("faster", [True, False])
def test_graphs_are_measured_by_default(make_config, faster: bool, caplog: pytest.LogCaptureFixture) -> None:
    """On CUDA, graphs are tried without being asked for; they stay where they are faster; the log has both times."""
    caplog.set_level(logging.INFO, "lorakit")
    run, batch = run_of(make_config)
    run.processes = OnCuda(torch.device("cuda"))
    run.schedule.total_steps = 10**6
    calls = []

    def learn(own: Batch) -> None:
        calls.append(own)
        run.loss.add_(1)
        time.sleep(0.05 if (own is batch) == faster else 0.001)

    chosen = Autotuner(run, learn)
    chosen(batch)
    assert run.uses_cuda_graphs == faster
    assert run.loss == 1
    (told,) = [record.getMessage() for record in caplog.records if "cuda_graphs" in record.getMessage()]
    assert told.startswith(f"training.cuda_graphs is {'on' if faster else 'off'}: ")
    assert " ms with it, " in told
    assert (calls[-1] is batch) == (not faster)
    # A first one and timed ones without graphs; with graphs also those to warm up; then the one that counts.
    assert len(calls) == 2 * (1 + TIMED) + WARM_UPS + 1


@pytest.mark.parametrize(
    ("training", "reason"),
    [
        ({"stream_base": ["unet"]}, "training.stream_base copies weights in each step"),
        ({"deterministic": True}, "training.deterministic excludes what depends on timing"),
        ({"compile": True, "compile_backend": "cudagraphs"}, "training.compile_backend captures them"),
    ],
)
def test_other_keys_leave_graphs_off(
    make_config, training: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Keys that graphs do not go with leave them off, which is told where there could be graphs."""
    caplog.set_level(logging.INFO, "lorakit")
    run, _ = run_of(make_config)
    caplog.clear()
    run.config = make_config(training=training)
    assert compile_step(run) == run.forward_backward
    assert "cuda_graphs" not in caplog.text
    run.processes = OnCuda(torch.device("cuda"))
    assert compile_step(run) == run.forward_backward
    assert f"training.cuda_graphs is off: {reason}" in caplog.text
    if "deterministic" not in training:
        with pytest.raises(ConfigError, match="cuda_graphs"):
            make_config(training={**training, "cuda_graphs": True})


def test_cpus_measure_nothing_by_default(make_config, caplog: pytest.LogCaptureFixture) -> None:
    """Without CUDA, the default costs nothing and says nothing."""
    caplog.set_level(logging.INFO, "lorakit")
    run, _ = run_of(make_config)
    caplog.clear()
    assert run.config.training.cuda_graphs == "auto"
    assert compile_step(run) == run.forward_backward
    assert not run.uses_cuda_graphs
    assert caplog.text == ""


@pytest.mark.parametrize(("rank", "count"), [(0, 1), (0, 2), (1, 2)])
def test_the_largest_shape_of_a_run(make_config, rank: int, count: int) -> None:
    """It is that of a process's part of the whole micro-batches of a bucket."""
    sizes = {"resolution": 128, "enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 256, "batch_size": 2}
    run = build_run(prepare(make_config(network={"parts": ["unet"]}, data=sizes)), Distributed(torch.device("cpu")))
    run.processes = Distributed(run.processes.device, rank, count)
    schedule = Schedule(run.loader.datasets, run.config.training, run.processes)
    shapes = {tuple(batch.latents.shape) for batch in schedule.batches_from(0, run.loader)}
    assert len(shapes) > 1 or count > 1
    largest = largest_latents(run)
    assert largest in shapes
    assert math.prod(largest) == max(map(math.prod, shapes))
