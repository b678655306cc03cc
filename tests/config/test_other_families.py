"""A family with another noise process and other sizes than Stable Diffusion: what configs are checked for then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.config.load import config_from_tables
from lorakit.config.train_config import TrainConfig
from lorakit.errors import ConfigError
from lorakit.plugins.catalog import Catalog
from tests.config.conftest import Tables, write_safetensors
from tests.guests import install

FAMILY = '''
from attrs import frozen
from lorakit.api import FlowSpec, ModelFamilyConfig, ModelPart, hookimpl


@frozen(kw_only=True)
class WideConfig(ModelFamilyConfig):
    """A flow-matching transformer."""

    name = "wide"
    title = "Wide"
    parts = (ModelPart("transformer", title="transformer", lora_prefix="lora_unet_"),)
    size_multiple = 16
    supports_weighted_captions = False

    @property
    def noise_process(self):
        """Flow matching."""
        return FlowSpec(preview_shift=3.0)

    def build(self, device, dtype):
        """Nothing."""


@hookimpl
def register_model_families():
    return [WideConfig]
'''


@pytest.fixture
def wide(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that reads tables with more in them, for a model of the family."""
    write_safetensors(base / "wide.safetensors", {"layers.0.weight": (2, 2)})
    install(tmp_path, "wide", wide_family=FAMILY)
    monkeypatch.syspath_prepend(tmp_path)

    def read(tables: Tables, **more: Tables) -> TrainConfig:
        merged = {key: {**tables.get(key, {}), **more.get(key, {})} for key in {**tables, **more} if key != "observers"}
        merged["model"] = {"path": "wide.safetensors", "family": "wide"}
        if "observers" in more:
            merged["observers"] = [more["observers"]]
        return config_from_tables(merged, base, Catalog.discover())

    return read


def test_defaults_are_the_process_s(wide: Any, tables: Tables) -> None:
    """Timesteps are logit-normal without a name, its keys are known, and bounds are shares of the way to noise."""
    config = wide(tables, timesteps={"mean": 0.5, "max": 0.9})
    assert (config.timesteps.name, config.timesteps.mean) == ("logit_normal", 0.5)
    assert config.timestep_sampler.bounds(config.model.noise_process) == (0, 0.9)
    assert not list(config.warnings())
    assert wide(tables, timesteps={"name": "uniform"}).timesteps.name == "uniform"


@pytest.mark.parametrize(
    ("more", "key", "message"),
    [
        ({"loss": {"min_snr_gamma": 5}}, "loss.min_snr_gamma", "this model uses flow matching"),
        ({"loss": {"type": "huber"}}, "loss.huber_schedule", "this model uses flow matching"),
        ({"loss": {"max_timestep": 900}}, "loss.max_timestep", "set timesteps.max, from 0 to 1"),
        ({"timesteps": {"max": 900}}, "timesteps.max", "must be at most 1"),
        ({"data": {"weighted_captions": True}}, "data.weighted_captions", "cannot be used with wide"),
        ({"data": {"resolution": 72}}, "data.resolution", "multiples of 16"),
        (
            {"data": {"enable_bucket": True, "min_bucket_reso": 64, "bucket_reso_steps": 24}},
            "data.bucket_reso_steps",
            "must be a multiple of 16",
        ),
        (
            {"observers": {"name": "samples", "prompts": ["a cat --ss euler"]}},
            "observers[0].sampler",
            "'euler' is not for flow matching",
        ),
        (
            {"observers": {"name": "validation", "timesteps": [0.5, 1.5]}},
            "observers[0].timesteps",
            "must be below 1",
        ),
    ],
)
def test_what_does_not_suit(wide: Any, tables: Tables, more: Tables, key: str, message: str) -> None:
    """What is made for another process, and sizes that the latents cannot have, are problems at their keys."""
    with pytest.raises(ConfigError) as raised:
        wide(tables, **more)
    (problem,) = raised.value.problems
    assert problem.key == key
    assert message in f"{problem.message} ({problem.hint})"


def test_previews_have_the_family_s_sizes_and_sampler(wide: Any, tables: Tables) -> None:
    """Sides are rounded to what the latents can have, and the sampler is the process's own."""
    from lorakit.previews.prompts import Prompt, preview_jobs

    model = wide(tables).model
    jobs = preview_jobs([Prompt(prompt="a"), Prompt(prompt="b", width=72, height=100)], 0, model)
    assert [(job.width, job.height, job.sampler.name) for job in jobs] == [
        (512, 512, "flow_euler"), (64, 96, "flow_euler"),
    ]  # fmt: skip
