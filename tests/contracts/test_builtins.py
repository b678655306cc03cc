"""Every component that comes with lorakit keeps the contract of its kind."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.api.components import Component, LRSchedulerConfig, OptimizerConfig, with_import_path
from lorakit.plugins.catalog import Catalog
from lorakit.plugins.discovery import REGISTRATION_HOOKS
from lorakit.testing import contracts
from lorakit.testing.flow_models import make_tiny_anima, make_tiny_z_image
from lorakit.testing.flux_models import make_tiny_chroma, make_tiny_flux
from lorakit.testing.models import make_tiny_sd1, make_tiny_sd2, make_tiny_sdxl, to_single_file

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "sd1": {"path": "tiny"},
    "sd2": {"path": "tiny", "prediction": "v_prediction"},
    "sdxl": {"path": "tiny", "prediction": "v_prediction"},
    "z_image": {"path": "tiny"},
    "flux1": {"path": "tiny"},
    "chroma": {"path": "tiny"},
    "anima": {"path": "tiny"},
    "lierla": {"rank": 4, "alpha": 2.0, "dropout": 0.1},
    "c3lier": {"rank": 4, "alpha": 2.0, "conv_rank": 2, "rank_dropout": 0.1},
    "loha": {"rank": 4, "alpha": 2.0, "conv_rank": 2, "module_dropout": 0.1},
    "lokr": {"rank": 2, "alpha": 1.0, "conv_rank": 2, "factor": 4, "decompose_both": True},
    "adamw": {"lr": 1e-2},
    "adamw8bit": {"lr": 1e-2},
    "pagedadamw": {"lr": 1e-2},
    "pagedadamw8bit": {"lr": 1e-2},
    "pagedadamw32bit": {"lr": 1e-2},
    "sgdnesterov": {"lr": 1e-2},
    "sgdnesterov8bit": {"lr": 1e-2},
    "lion": {"lr": 3e-3},
    "lion8bit": {"lr": 3e-3},
    "pagedlion8bit": {"lr": 3e-3},
    "adafactor": {"lr": 1e-2},
    "constant_with_warmup": {"warmup_steps": 0.1},
    "linear": {"warmup_steps": 0.1},
    "cosine": {"warmup_steps": 0.1},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0, "lr_end": 0.0},
    "cosine_with_min_lr": {"warmup_steps": 0.1, "min_lr_ratio": 0.2},
    "warmup_stable_decay": {"warmup_steps": 0.1, "decay_steps": 0.3},
    "piecewise_constant": {"step_rules": "1:0.2,0.1:0.6,0.01"},
    "torch.optim.RAdam": {"lr": 1e-2, "args": {"betas": [0.9, 0.99]}},
    "torch.optim.lr_scheduler.StepLR": {"args": {"step_size": 30, "gamma": 0.5}},
    "sdpa": {"kernels": ("cudnn", "flash", "efficient")},
    "huber": {"huber_schedule": "exponential", "min_snr_gamma": 5.0},
    "smooth_l1": {"huber_schedule": "constant", "huber_c": 0.2},
    "logit_normal": {"mean": 0.2, "std": 0.8},
    "tensorboard": {"dir": Path("logs")},
    "hub": {"repo_id": "me/my-lora", "states": True},
    "validation": {"every_n_steps": 1, "timesteps": (100, 900)},
    "samples": {"prompts": Path("prompts.txt"), "every_n_steps": 1, "at_first": True, "sampler": "euler_a"},
}
"""The settings to test each component with; the others are tested with their defaults."""

PATHS: Mapping[type[Component], str] = {
    OptimizerConfig: "torch.optim.RAdam",
    LRSchedulerConfig: "torch.optim.lr_scheduler.StepLR",
}
"""The class to test those components with that stand for any class of their kind."""

ATTRIBUTES: Mapping[str, Mapping[str, Any]] = {
    "sd1": {"make_model": lambda _, folder: make_tiny_sd1(folder), "text_settings": {"clip_skip": 2}},
    "sd2": {
        "make_model": lambda _, folder: to_single_file(make_tiny_sd2(folder), folder.with_suffix(".safetensors")),
        "text_settings": {"clip_skip": 2},
    },
    "sdxl": {
        "make_model": lambda _, folder: to_single_file(make_tiny_sdxl(folder), folder.with_suffix(".safetensors")),
        "text_settings": {"max_token_length": 150},
    },
    "z_image": {"make_model": lambda _, folder: make_tiny_z_image(folder)},
    "flux1": {
        "make_model": lambda _, folder: make_tiny_flux(folder),
        "text_settings": {"max_token_length": 64},
    },
    "chroma": {
        "make_model": lambda _, folder: make_tiny_chroma(folder),
        "text_settings": {"max_token_length": 64},
    },
    "anima": {"make_model": lambda _, folder: make_tiny_anima(folder)},
    "checkpoints": {
        "run_settings": {
            "output": {"save_every_n_steps": 1, "save_every_n_epochs": 1, "keep_last": 2, "save_state": True}
        }
    },
    "torch.optim.lr_scheduler.StepLR": {"stretches": False},
    "inverse_sqrt": {"stretches": False},
    "validation": {"run_settings": {"data": {"validation_split": 0.25}, "network": {"dropout": 0.2}}},
    "metadata_file": {
        "files": {"list.jsonl": '{"file_name": "beach.png", "text": "a beach"}\n{"file_name": "snow.png"}\n'},
        "subset_settings": {"metadata_file": Path("list.jsonl")},
    },
    "samples": {"files": {"prompts.txt": "a beach --w 64 --h 64 --s 2\n"}},
    "ckpt": {"keeps_metadata": False},
    "pt": {"keeps_metadata": False},
}
"""What the suites must know of single components."""


def base_of(component: type[Component]) -> type[Component]:
    """The base class of a component's kind."""
    return next(base for base in REGISTRATION_HOOKS.values() if issubclass(component, base))


BUILTINS = [
    with_import_path(found.component, PATHS.get(base_of(found.component), ""))
    for found in Catalog.discover().registrations
    if found.provider.is_of("lorakit")
]


def suite_for(component: type[Component]) -> type[contracts.ComponentContract]:
    """The suite of a component's kind, set up for it: `SdpaConfig` gives `TestSdpa`."""
    base = base_of(component)
    contract = getattr(contracts, base.__name__.replace("Config", "Contract"))
    config = component(**SETTINGS.get(component.name, {}))
    attributes = {"config": config, "__module__": __name__, "__doc__": contract.__doc__}
    name = f"Test{component.__name__.removesuffix('Config')}"
    return type(name, (contract,), {**attributes, **ATTRIBUTES.get(component.name, {})})


globals().update({suite.__name__: suite for suite in map(suite_for, BUILTINS)})


def test_every_builtin_has_a_suite() -> None:
    """Each entry point of lorakit has given a component and a suite of its own; none is broken or left out."""
    entry_points = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["entry-points"]["lorakit"]
    suites = [value for value in globals().values() if isinstance(value, type) and value.__name__.startswith("Test")]
    # One plugin has no component: it only names models that no family trains.
    detectors = {"lorakit.builtin.model_families.untrained"}
    assert {component.__module__ for component in BUILTINS} | detectors == set(entry_points.values())
    assert sorted(suite.config.name for suite in suites) == sorted(component.name for component in BUILTINS)


def test_no_setting_is_for_nothing() -> None:
    """The tables above name only components that exist."""
    assert (SETTINGS.keys() | ATTRIBUTES.keys()) <= {component.name for component in BUILTINS}
