"""Steps whose loss or gradients are not finite: named, then skipped without a trace, or the end of the run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.api.observer import Observer, StepMetrics
from lorakit.data.batch_sampler import StepPlan
from lorakit.errors import TrainingDiverged
from lorakit.networks.flat_parameters import FlatParameters
from lorakit.networks.network import ParameterGroup
from lorakit.training.loop import train
from lorakit.training.observers import Observers
from lorakit.training.prepare import prepare
from lorakit.training.run import Run
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.schedule import Step
from lorakit.training.setup import build_run
from lorakit.training.step.gradients import FlatGradients
from lorakit.training.step.nan_guard import OVERFLOWS_IN_A_ROW, DivergenceMonitor
from tests.training.test_runs import _free_port, run_lorakit, weights_of, write_config


class Watching(Observer):
    """Keeps the factors after each step, and which steps have had numbers."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.factors = [run.network.adapter_state()]
        self.reported: list[int] = []

    def step_finished(self, step: int) -> None:  # noqa: ARG002
        """Keep them."""
        self.factors.append(self._run.network.adapter_state())

    def metrics_read(self, metrics: StepMetrics) -> None:
        """Note the step."""
        assert torch.tensor([metrics.loss, metrics.gradient_norm]).isfinite().all()
        self.reported.append(metrics.step)

    def changes(self) -> list[bool]:
        """Whether each step has changed a factor."""
        pairs = zip(self.factors, self.factors[1:], strict=False)
        return [any(not torch.equal(before[key], after[key]) for key in before) for before, after in pairs]


def spoil(entry: Path) -> None:
    """Make the loss of a cached image NaN: latents so large that the model cannot bear them."""
    tensors = load_file(entry)
    tensors["mean"].fill_(3e30)
    save_file(tensors, entry)


def spoiled_run(make_config, tmp_path: Path, count: int, **sections: dict[str, Any]) -> tuple[Run, list[str]]:
    """A run with a cache of its own in which the latents of so many images are spoiled; and their names."""
    sections["data"] = {"cache_dir": str(tmp_path / "own-cache"), **sections.get("data", {})}
    run = build_run(
        prepare(make_config(model={"prediction": "v_prediction"}, **sections)), Distributed(torch.device("cpu"))
    )
    chosen = list(run.loader.latent_keys.items())[:count]
    for _, key in chosen:
        spoil(next(run.loader.cache.folder.rglob(f"{key}.safetensors")))
    return run, [identity.rpartition("/")[2] for (identity, _), _ in chosen]


def skipped_in(text: str) -> list[int]:
    """The steps that a log says were skipped."""
    return [int(step) for step in re.findall(r"step (\d+) is skipped: the loss is (?:nan|inf)", text)]


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "no"), ("adamw8bit", "no"), ("adamw", "fp16")])
def test_a_step_is_skipped(
    make_config, tmp_path: Path, caplog: pytest.LogCaptureFixture, optimizer: str, precision: str
) -> None:
    """A step with a spoiled image is named with the image and changes no factor, nor the scale; all others train."""
    training = {"on_nonfinite": "skip", "max_steps": 8, "mixed_precision": precision}
    run, (name,) = spoiled_run(make_config, tmp_path, 1, training=training, optimizer={"name": optimizer})
    watching = Watching(run)
    if run.scaler.is_enabled():
        run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 1024.0})
    train(RunHandle(run, Observers([("watching", True, watching)])))
    assert run.scaler.get_scale() == (1024.0 if run.scaler.is_enabled() else 1.0)
    skipped = skipped_in(caplog.text)
    assert len(skipped) == 2
    assert caplog.text.count(f"the loss is nan. Images of this step: {name}.") == 2
    assert [step for step, changed in enumerate(watching.changes(), 1) if not changed] == skipped
    assert watching.reported == [step for step in range(1, 9) if step not in skipped]


def test_an_accumulated_step_is_skipped_as_a_whole(
    make_config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a step of several micro-batches the one that is at fault is named; the others change nothing either."""
    training = {"on_nonfinite": "skip", "max_steps": 4, "gradient_accumulation_steps": 2}
    run, (name,) = spoiled_run(make_config, tmp_path, 1, training=training)
    watching = Watching(run)
    train(RunHandle(run, Observers([("watching", True, watching)])))
    assert caplog.text.count(f"the loss is nan. Images of this step: {name}.") == 2
    assert [step for step, changed in enumerate(watching.changes(), 1) if not changed] == skipped_in(caplog.text)


def test_the_run_stops_at_once(make_config, tmp_path: Path) -> None:
    """Unless it is told to skip, a run stops at the first such step, and says how to skip it."""
    run, (name,) = spoiled_run(make_config, tmp_path, 1, training={"max_steps": 8})
    expected = rf"step [1-4]: the loss is nan, so .* Images of this step: {re.escape(name)}\. .*on_nonfinite = \"skip\""
    with pytest.raises(TrainingDiverged, match=expected):
        train(RunHandle(run))


def test_too_many_skips(make_config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run in which no step counts any more stops, however it is set."""
    run, _ = spoiled_run(make_config, tmp_path, 4, training={"on_nonfinite": "skip", "max_steps": 30})
    before = run.network.adapter_state()
    with pytest.raises(TrainingDiverged, match="step 20: the loss is nan, as in the 19 steps before, so training was"):
        train(RunHandle(run))
    assert skipped_in(caplog.text) == list(range(1, 20))
    assert all(torch.equal(before[key], after) for key, after in run.network.adapter_state().items())


def test_gradients_are_named_by_part(make_config) -> None:
    """Gradients that overflow though the loss is finite are named by the part of the model that they are of."""
    run = build_run(prepare(make_config()), Distributed(torch.device("cpu")))
    down, up = run.network.parameters_of("text_encoder")[:2]
    with torch.no_grad():
        down.mul_(1e-30)
        up.fill_(1e30)
    with pytest.raises(TrainingDiverged, match=r"step 1: the gradient of text_encoder is (inf|nan), so .*\.png"):
        train(RunHandle(run))


def test_two_processes_skip_alike(tables: dict[str, Any], tmp_path: Path) -> None:
    """A spoiled image of one process makes all processes skip the step, as one process alone would."""
    sections = {
        "model": {"prediction": "v_prediction"},
        "data": {"cache_dir": str(tmp_path / "own-cache")},
        "network": {"parts": ["unet"]},
        "optimizer": {"eps": 0.01},
        "training": {"max_steps": 4, "on_nonfinite": "skip"},
    }
    path = write_config(tables, tmp_path, **sections)
    assert run_lorakit("cache", path).returncode == 0
    latents = [file for file in (tmp_path / "own-cache").rglob("*.safetensors") if "mean" in load_file(file)]
    spoil(latents[0])
    alone = run_lorakit("train", path, "--set", "data.batch_size=2", "--set", "output.name=alone")
    assert alone.returncode == 0, alone.stderr
    options = ("--cpu", "--num_processes", "2", "--main_process_port", str(_free_port()))
    together = run_lorakit("train", path, launcher=("-m", "accelerate.commands.launch", *options))
    assert together.returncode == 0, together.stderr
    assert len(skipped_in(alone.stderr)) == 2
    assert set(skipped_in(alone.stderr)) == set(skipped_in(together.stderr))
    left, right = (weights_of(tmp_path / "out" / f"{name}.safetensors") for name in ("alone", "test"))
    assert any(tensor.abs().max() > 0 for key, tensor in left.items() if "lora_up" in key)
    for key in left:
        assert (right[key] - left[key]).norm() <= 1e-2 * left[key].norm() + 1e-9, key


def test_overflow_is_the_scalers_business(make_config, caplog: pytest.LogCaptureFixture) -> None:
    """With fp16, steps whose gradients overflow because the loss is scaled too high are not told of."""
    config = make_config(training={"mixed_precision": "fp16", "max_steps": 6}, network={"parts": ["unet"]})
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 2.0**36})
    before = run.network.adapter_state()
    train(RunHandle(run))
    assert run.scaler.get_scale() < 2.0**36
    assert "skipped" not in caplog.text
    assert all(tensor.isfinite().all() for tensor in run.network.adapter_state().values())
    assert run.scaler.get_scale() >= 2.0**30
    assert before.keys() == run.network.adapter_state().keys()


def test_overflow_without_end() -> None:
    """Gradients that overflow however low the loss is scaled stop the run in the end."""
    parameter = torch.nn.Parameter(torch.ones(3))
    gradients = FlatGradients(FlatParameters([ParameterGroup("unet", "unet", (parameter,), 1e-3)]))
    assert parameter.grad is not None
    parameter.grad[1] = torch.inf
    norm = gradients.clip(1.0)
    monitor = DivergenceMonitor(gradients.groups, skips=False, scaled=True, is_main=True)
    steps = []
    for number in range(OVERFLOWS_IN_A_ROW):
        step = Step(StepPlan(1, (), number), iter(()), [("a.png",)], [torch.ones(())])
        step.group_norms = gradients.norms
        steps.append(step)
    assert all(monitor.check(step, 1.0, norm.item()) for step in steps[:-1])
    with pytest.raises(TrainingDiverged, match=f"step {OVERFLOWS_IN_A_ROW}: the gradient of unet is inf, as in the 49"):
        monitor.check(steps[-1], 1.0, norm.item())
