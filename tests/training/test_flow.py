"""Runs with flow matching: a tiny U-Net that predicts velocities, trained, validated, resumed and previewed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve, frozen
from safetensors.torch import load_file

from lorakit.api.components import ObserverConfig
from lorakit.api.noise import FlowSpec, NoiseSpec
from lorakit.api.sampling import TimestepSamplerConfig
from lorakit.builtin.model_families.sd1 import SD1Config
from lorakit.config.train_config import TrainConfig
from lorakit.diffusion.flow import FlowMatching
from lorakit.plugins.catalog import Catalog
from lorakit.training.checkpoint.state import state_folder
from lorakit.training.prepare import prepare
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run, run_training
from lorakit.training.step.loss import denoising_loss

CATALOG = Catalog.discover()
SPEC = FlowSpec(shift=2.0, preview_shift=3.0)


@frozen(kw_only=True)
class FlowConfig(SD1Config):
    """A U-Net whose output is taken for the velocity."""

    name = "flow"

    @property
    def noise_process(self) -> NoiseSpec:
        """Flow matching."""
        return SPEC

    def build(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The model, which takes a thousand times t."""
        model: Any = super().build(device, dtype)
        flow, predict = FlowMatching(SPEC), model.predict
        model.noise = flow
        model.predict = lambda noisy, t, conditioning: predict(noisy, flow.model_timesteps(t), conditioning)
        return model


@pytest.fixture
def flow_config(make_config: Any, tiny_sd1: Path) -> Any:
    """A function from changed sections to the config of a run with flow matching."""

    def make(**sections: Any) -> TrainConfig:
        sampler = CATALOG.find(TimestepSamplerConfig, "logit_normal")(max=0.9)
        return evolve(make_config(**sections), model=FlowConfig(path=str(tiny_sd1)), timesteps=sampler)

    return make


def test_loss_is_the_formula(flow_config: Any) -> None:
    """The loss is |v̂ − (ε − x₀)|² at (1 − t)·x₀ + t·ε, with timesteps between 0 and 1 in float32."""
    run = build_run(
        prepare(flow_config(data={"batch_size": 2}, network={"parts": ["unet"]})), Distributed(torch.device("cpu"))
    )
    batch = next(run.schedule.batches_from(0, run.loader))
    assert batch.timesteps.dtype == torch.float32
    assert ((batch.timesteps > 0) & (batch.timesteps < 0.9)).all()
    t, conditioning = batch.timesteps.double().view(-1, 1, 1, 1), run.encode(batch)
    noisy = (1 - t) * batch.latents.double() + t * batch.noise.double()
    with torch.no_grad():
        velocity = run.model.predict(noisy.float(), batch.timesteps, conditioning).double()
    expected = (velocity - (batch.noise.double() - batch.latents.double())).square().mean()
    found = denoising_loss(run.model, batch, conditioning, run.criterion)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_a_run_with_validation_and_previews(flow_config: Any) -> None:
    """Loss, validation at shares of the way and previews are there, and a resumed run ends with the same bytes."""
    samples = CATALOG.find(ObserverConfig, "samples")(prompts=("a cat --w 64 --h 64 --s 2 --l 3",), every_n_steps=2)
    settings: Any = {
        "data": {"validation_split": 0.25}, "training": {"max_steps": 4},
        "output": {"save_every_n_steps": 2, "save_state": True, "keep_last_states": 2},
    }  # fmt: skip
    config = evolve(flow_config(**settings), observers=(samples,))
    path = run_training(prepare(config), CATALOG)
    first = load_file(path)
    assert len(list((path.parent / "sample").glob("test_00*.png"))) == 2
    state = min(folder for folder in state_folder(config).iterdir() if folder.is_dir())
    resumed = run_training(prepare(config), CATALOG, resume=state)
    assert {name: tensor.tolist() for name, tensor in load_file(resumed).items()} == {
        name: tensor.tolist() for name, tensor in first.items()
    }
