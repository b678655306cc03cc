"""The base model of a run, with what the run asks of it and of the device."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from attrs import evolve

from lorakit.config.train_config import TrainConfig, TrainingSection, with_section
from lorakit.diffusion.noise_schedule import DDPMSchedule
from lorakit.errors import ConfigError, Problem
from lorakit.models.interfaces import DiffusionModel
from lorakit.models.memory.compile import compile_unsupported_reason
from lorakit.plugins.build import build_component
from lorakit.training.runtime.hardware import fp16_on_cpu, hardware_warnings

log = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_model(config: TrainConfig, device: torch.device) -> DiffusionModel:
    """The base model with the noise process that the loss asks for, its weights not read yet.

    Raises ConfigError where the loss does not suit what the model predicts, or the device cannot do what is asked.
    """
    model = load_model(config, device)
    problems = [
        *with_section(model.noise.spec.loss_problems(config.loss), "loss"),
        *_problems_of_the_device(config.training, device),
    ]
    if problems:
        raise ConfigError(problems)
    for warning in _new_warnings(config, model, device):
        log.warning("%s", warning)
    if config.loss.zero_terminal_snr and isinstance(model.noise, DDPMSchedule):
        model.noise = model.noise.with_zero_terminal_snr()
    return model


def load_model(config: TrainConfig, device: torch.device) -> DiffusionModel:
    """The base model in the number formats of the run, its weights not read yet; nothing else is looked at."""
    model: DiffusionModel = build_component(config.model, device, DTYPES[config.training.mixed_precision])
    if config.training.quantization:
        model.quantize(config.training.quantization)
    if config.training.stream_base:
        model.stream(config.training.stream_base)
    return model


def _problems_of_the_device(training: TrainingSection, device: torch.device) -> Iterator[Problem]:
    if training.fp8_base and device.type == "mps":
        yield Problem("training.fp8_base", "cannot be used on mps, which lacks the number format")
    if training.cuda_graphs is True and device.type != "cuda":
        yield Problem(
            "training.cuda_graphs", f"needs CUDA, and this run is on {device.type}", 'leave it out, or use "auto"'
        )
    if training.compile is True and (reason := compile_unsupported_reason(training.compile_backend, device)):
        key = "compile" if training.compile_backend == "inductor" else "compile_backend"
        yield Problem(f"training.{key}", reason)


def _new_warnings(config: TrainConfig, model: DiffusionModel, device: torch.device) -> Iterator[Problem]:
    """What could not be told from the config alone."""
    told = any(doubt.key == "training.mixed_precision" for doubt in hardware_warnings(config.training))
    if device.type == "cpu" and not told:
        doubt = fp16_on_cpu(config.training, "PyTorch finds no accelerator")
        yield from [doubt] if doubt else []
    if config.training.device == "auto":
        yield from (evolve(own, key=f"training.{own.key}") for own in config.training.ineffective_offload(device.type))
    if model.noise.spec != config.model.noise_process:
        yield from with_section(model.noise.spec.loss_warnings(config.loss), "loss")
