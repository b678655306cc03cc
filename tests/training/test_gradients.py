"""The gradients of a whole step, however a run computes it, against those of W + scale·U·D in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor, nn

from lorakit.config.load import read_config
from lorakit.config.train_config import TrainConfig
from lorakit.networks.lora import LoRAModule
from lorakit.training.prepare import prepare
from lorakit.training.run import Run
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run
from lorakit.training.step.autotune import compile_step
from lorakit.training.step.cuda_graphs import CudaGraphStep
from lorakit.training.step.loss import denoising_loss
from tests.networks.test_lora import error, merged
from tests.training.conftest import MakeConfig
from tests.training.test_runs import write_config
from tests.training.test_several_processes import together

Sections = dict[str, Any]

SIZE = 96
"""Pixels; of smaller images the tiny model normalises groups of two numbers, which magnifies rounding."""


def started(config: TrainConfig, processes: Distributed | None = None) -> Run:
    """A run at its first step, whose factors have an effect."""
    run = build_run(prepare(config), processes or Distributed(torch.device("cpu")))
    generator = torch.Generator().manual_seed(0)
    for parameter in run.flat.parameters:
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return run


def computed(run: Run) -> Tensor:
    """The gradients of a run's first step as it computes them, summed over its processes and not scaled."""
    forward_backward = compile_step(run)
    step = next(run.schedule.steps_from(0, run.schedule.batches_from(0, run.loader)))
    for batch in step.batches:
        forward_backward(batch)
    run.gradients.all_reduce(run.processes)
    run.scaler.unscale_(run.optimizer)
    return run.gradients.buffer


class Merged(nn.Module):
    """An adapted layer as a single operation in float64, for autograd."""

    def __init__(self, adapter: LoRAModule) -> None:
        super().__init__()
        self.adapter = [adapter]  # no part of this module
        self.down, self.up = (nn.Parameter(own.detach().double()) for own in (adapter.lora_down, adapter.lora_up))

    def forward(self, x: Tensor) -> Tensor:
        """What the adapted layer puts out."""
        return merged(self.adapter[0], x, self.down, self.up)


def exact(run: Run) -> Tensor:
    """The same gradients in float64."""
    run.network.detach()
    run.model.dtype = torch.float64
    for part in run.parts_in_memory:
        run.model.module(part).double()
    layers = []
    for target, adapter in zip(run.network.targets, run.network.adapters, strict=True):
        layers.append(Merged(adapter))
        target.replace(layers[-1])
    step = next(run.schedule.steps_from(0, run.schedule.batches_from(0, run.loader)))
    for batch in step.batches:
        denoising_loss(run.model, batch, run.encode(batch), run.criterion).backward()
    found = {own.adapter[0].lora_down: own.down.grad for own in layers}
    found |= {own.adapter[0].lora_up: own.up.grad for own in layers}
    return torch.cat([found[parameter].flatten() for parameter in run.flat.parameters])


@pytest.fixture(scope="module")
def known() -> dict[str, Tensor]:
    """Exact gradients that were computed before, by what they depend on."""
    return {}


def expected(config: TrainConfig, known: dict[str, Tensor]) -> Tensor:
    """The exact gradients of a config, however it would compute them."""
    plain = dict.fromkeys(("compile", "gradient_checkpointing", "channels_last"), False)
    training = evolve(config.training, mixed_precision="no", stream_base=(), **plain)
    key = repr((config.network, config.data, training))
    if key not in known:
        known[key] = exact(started(evolve(config, training=training)))
    return known[key]


WAYS: dict[str, Sections] = {
    "as usual": {},
    "the U-Net alone": {"network": {"parts": ["unet"]}},
    "convolutions": {"network": {"name": "c3lier", "conv_rank": 3}},
    "rank 1": {"network": {"rank": 1}},
    "rank 128": {"network": {"rank": 128}},
    "ranks that differ": {"network": {"block_ranks": [1 + number % 4 for number in range(25)]}},
    "LoRA+": {"network": {"loraplus_lr_ratio": 4.0}},
    "one image": {"data": {"batch_size": 1}},
    "eight images": {"data": {"batch_size": 8, "num_repeats": 2}},
    "several micro-batches": {"data": {"batch_size": 1}, "training": {"gradient_accumulation_steps": 3}},
    "recomputed": {"training": {"gradient_checkpointing": True}},
    "partly recomputed": {"training": {"gradient_checkpointing": 0.4}},
    "compiled": {"training": {"compile": True, "compile_backend": "aot_eager"}},
    "channels last": {"training": {"channels_last": True}},
    "streamed": {"training": {"stream_base": ["unet", "text_encoder"]}},
}


@pytest.mark.parametrize("way", WAYS)
def test_float32(make_config: MakeConfig, known: dict[str, Tensor], way: str) -> None:
    """They are those of float64 but for rounding."""
    sections = WAYS[way]
    data = {"resolution": SIZE, "batch_size": 2, **sections.get("data", {})}
    config = make_config(**{**sections, "data": data})
    assert error(computed(started(config)), expected(config, known)) < 1e-5


def test_captured(make_config: MakeConfig, known: dict[str, Tensor]) -> None:
    """What a CUDA graph would do again adds the same gradients."""
    data = {"resolution": SIZE, "batch_size": 1}
    config = make_config(data=data, training={"gradient_accumulation_steps": 3})
    run = started(config)
    run.config = evolve(config, training=evolve(config.training, cuda_graphs=True))
    assert isinstance(compile_step(run), CudaGraphStep)
    assert error(computed(run), expected(config, known)) < 1e-5


@pytest.mark.parametrize("network", ["lierla", "c3lier"])
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_half_precision(
    make_config: MakeConfig, known: dict[str, Tensor], network: str, precision: str, tolerance: float
) -> None:
    """They are no further off than those of adapters that compute, cast and add each for itself; scaled losses, too."""
    data = {"resolution": SIZE, "batch_size": 2}
    config = make_config(network={"name": network}, data=data, training={"mixed_precision": precision})
    run, apart = started(config), started(config)
    for adapter in apart.network.adapters:
        adapter.flat = adapter.shared = None
    right = expected(config, known)
    found, before = error(computed(run), right), error(computed(apart), right)
    assert run.scaler.is_enabled() == (precision == "fp16")
    assert found < min(1.1 * before, tolerance)


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.training.test_gradients import write_gradients
write_gradients(*sys.argv[2:])
"""


def write_gradients(config: str, to: str) -> None:
    """Write the gradients that this process has after the first step of a config."""
    processes = Distributed.init("cpu")
    run = started(read_config(Path(config)), processes)
    torch.save(computed(run), f"{to}-{processes.rank}.pt")


def test_several_processes(tables: Sections, make_config: MakeConfig, known: dict[str, Tensor], tmp_path: Path) -> None:
    """Each of two processes has the gradients of all images of both."""
    (tmp_path / "program.py").write_text(PROGRAM)
    data = {"resolution": SIZE}
    path = write_config(tables, tmp_path, data={**data, "batch_size": 1})
    root = Path(__file__).parents[2]
    for result in together(tmp_path / "program.py", root, path, tmp_path / "gradients"):
        assert result.returncode == 0, result.stderr
    right = expected(make_config(data={**data, "batch_size": 2}), known)
    for rank in range(2):
        assert error(torch.load(tmp_path / f"gradients-{rank}.pt"), right) < 1e-5
