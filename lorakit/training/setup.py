"""From a config to a run, in phases that free what is no longer needed.

Index the data → encode what can be encoded once → free the encoders → load the denoiser, attach the
network → the loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from attrs import evolve

from lorakit.api.components import ObserverConfig
from lorakit.api.observer import Observer
from lorakit.config.train_config import TrainConfig, with_section
from lorakit.data.batch_sampler import RunLength
from lorakit.data.loader import BatchLoader
from lorakit.errors import ConfigError, Interrupted, PluginError, Problem
from lorakit.models.conditioning import ImageConditioned
from lorakit.models.interfaces import AdaptationTarget, DiffusionModel
from lorakit.models.memory.compile import compile_unsupported_reason
from lorakit.networks.adapter_file import load_initial_weights
from lorakit.networks.flat_parameters import FlatParameters
from lorakit.networks.network import Network, ParameterGroup
from lorakit.plugins.build import build_component
from lorakit.plugins.catalog import Catalog
from lorakit.training.checkpoint.compatibility import RunFingerprint
from lorakit.training.checkpoint.state import find_state, forget_end, has_ended, note_end, state_folder
from lorakit.training.encode import Encoded, Filled, encode_data
from lorakit.training.loop import train
from lorakit.training.output.adapter_writer import AdapterWriter
from lorakit.training.output.folder import run_lock
from lorakit.training.output.metadata import run_metadata
from lorakit.training.prepare import PreparedRun
from lorakit.training.run import Run
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.device import device_summary, device_warnings, rank_summary
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.runtime.hardware import fp16_on_cpu, hardware_warnings
from lorakit.training.runtime.out_of_memory import MemoryPressureMonitor, cuda_pressure, memory_hint
from lorakit.training.runtime.precision import precision_of, run_precision, with_precision
from lorakit.training.runtime.signals import StopRequest
from lorakit.training.schedule import Schedule
from lorakit.training.step.autotune import requested, set_up_model
from lorakit.training.step.gradients import FlatGradients
from lorakit.training.step.numerics import deterministic_mode
from lorakit.training.summary import log_row
from lorakit.training.validation import ValidationSet
from lorakit.utils.atomic_io import remove_stale_temp_files
from lorakit.utils.wording import file_size

log = logging.getLogger(__name__)

DEFAULT_OBSERVERS = ("checkpoints", "progress", "validation")
"""Observers that need not be named in the config; one that is replaces its default."""


def run_training(
    prepared: PreparedRun,
    catalog: Catalog,
    resume: Path | Literal["latest"] | None = None,
    observers: Sequence[Observer] = (),
    stop: threading.Event | None = None,
) -> Path:
    """Train as the config of a prepared run says; returns the path of the final file.

    `resume` is the folder of a state, or the latest one of the run. `observers` are notified before those that the
    config names; `stop` ends the run after a step. Raises OutputError while another run writes files of the same name
    to the same folder.
    """
    if stop is not None and stop.is_set():
        raise Interrupted("Stopped before the first step.")
    # Before anything is computed: cuBLAS reads its part of it at its first product.
    with deterministic_mode(prepared.config.training.deterministic):
        prepared, processes = init_distributed(prepared)
        config = prepared.config
        with run_lock(config.output) if processes.is_main else nullcontext():
            clean_up(config, processes)
            state = None
            if resume is not None:
                fingerprint = RunFingerprint.of(prepared, processes.world_size)
                state = find_state(fingerprint, None if resume == "latest" else resume)
                total = prepared.length.total_steps
                final = config.output.dir / f"{config.output.name}{build_component(config.saver).suffix}"
                if resume == "latest" and final.is_file() and has_ended(state, total):
                    key = "training.max_epochs" if config.training.max_epochs else "training.max_steps"
                    hint = f"to train on, raise {key}; to repeat the run, leave out --resume"
                    log.warning("this run has ended already, after all of its %d steps: %s (%s)", total, final, hint)
                    return final
            handle = _begin(prepared, catalog, processes, state, StopRequest(stop))
            # First, so that they know the step of what others save.
            for observer in reversed(observers if processes.is_main else ()):
                handle.observers.add(type(observer).__name__, observer, first=True)
            try:
                train(handle)
            finally:
                prepared.cache.memo.save()
            if processes.is_main:
                note_end(state_folder(config), handle.total_steps)
    return handle.run.writer.path(config.output.name)


def init_distributed(prepared: PreparedRun) -> tuple[PreparedRun, Distributed]:
    """The run with the precision of its devices, and its processes.

    The main one logs device, precision and warnings, and each of several its own device.
    What is saved of the run has that precision too, so that it does not depend on where it is read.
    """
    before = prepared.config
    processes = Distributed.init(before.training.device, before.training.process_timeout)
    precision = run_precision(before, processes)
    config = with_precision(before, precision)
    if processes.is_main:
        log_row("device", device_summary(processes.device, str(precision), processes.world_size))
        warnings = list(device_warnings(config.training, processes.device))
        if precision.value != "no":  # what the config would have been warned of, had it named the precision
            known = set(before.warnings())
            warnings += [warning for warning in config.warnings() if warning not in known]
        for warning in warnings:
            log.warning("%s", warning)
    if processes.world_size > 1:
        log_row(f"rank {processes.rank}", rank_summary(processes.device, processes.world_size))
    return evolve(prepared, config=config), processes


def _begin(
    prepared: PreparedRun, catalog: Catalog, processes: Distributed, state: Path | None, stop: StopRequest
) -> RunHandle:
    """The run at its first step, or where a state was saved, with its observers."""
    if state is None and processes.is_main:
        forget_end(state_folder(prepared.config))
    run = build_run(prepared, processes)
    handle = RunHandle(run, stop=stop)
    if processes.is_main:
        log_row("adapters", f"{len(run.network.adapters)}, {file_size(run.writer.size)} a file")
    if state is not None:
        handle.load_state(state)
        log.info("resuming from step %d of %d", run.step, run.schedule.total_steps)
    if processes.is_main:
        run.writer.write_config(catalog)
    add_observers(handle, catalog)
    if processes.is_main and processes.device.type == "cuda":
        monitor = MemoryPressureMonitor(cuda_pressure(processes.device), partial(memory_hint, run))
        handle.observers.add("memory", monitor)
    return handle


def fill_cache(prepared: PreparedRun) -> Mapping[str, Filled]:
    """Encode all images, and the captions where they stay the same over the run; returns how many were new."""
    with deterministic_mode(prepared.config.training.deterministic):
        prepared, processes = init_distributed(prepared)
        clean_up(prepared.config, processes)
        model = build_model(prepared.config, processes.device)
        check_initial_weights(model, prepared.config)
        return encode_data(prepared, model, processes).filled


def build_run(prepared: PreparedRun, processes: Distributed) -> Run:
    """A run at its first step: caches filled, encoders freed, denoiser loaded, network attached."""
    started = time.time()
    config = with_precision(prepared.config, run_precision(prepared.config, processes))
    prepared = evolve(prepared, config=config)
    model = build_model(config, processes.device)
    length = RunLength.of(prepared.datasets, config.training, processes.world_size)
    dry_run_optimizer(config, length.total_steps, processes.device)
    check_initial_weights(model, config)
    # Other processes could not read what is in the memory of one.
    encoded = encode_data(prepared, model, processes, keep_unwritten=processes.world_size == 1)
    fingerprint = RunFingerprint.of(prepared, processes.world_size)
    return build_run_from(prepared, model, encoded, processes, started, fingerprint)


def build_run_from(
    prepared: PreparedRun,
    model: DiffusionModel,
    encoded: Encoded,
    processes: Distributed,
    started: float,
    fingerprint: RunFingerprint | None = None,
) -> Run:
    """A run at its first step, on encoded data; `started` is in seconds since 1970."""
    config = prepared.config
    schedule = Schedule(prepared.datasets, config.training, processes)
    loader = BatchLoader(
        datasets=prepared.datasets,
        cache=prepared.cache,
        seed=config.training.seed,
        timestep_sampler=build_component(config.timestep_sampler, model.noise),
        latent_keys=encoded.latent_keys,
        captions=encoded.captions,
        total_steps=schedule.total_steps,
        prior_loss_weight=config.data.prior_loss_weight,
        loss=config.loss,
        live=encoded.live,
        image_conditioning=model.image_conditioning if isinstance(model, ImageConditioned) else None,
    )
    network, flat = attach_network(model, config)
    optimizer = build_component(config.optimizer, flat.groups_for(config.optimizer))
    metadata = run_metadata(prepared, schedule, processes, optimizer, started)
    return Run(
        config=config,
        model=model,
        network=network,
        optimizer=optimizer,
        lr_scheduler=build_component(config.lr_scheduler, optimizer, schedule.total_steps),
        flat=flat,
        gradients=FlatGradients(flat),
        scaler=torch.amp.GradScaler(processes.device.type, enabled=config.training.mixed_precision == "fp16"),
        schedule=schedule,
        loader=loader,
        processes=processes,
        writer=AdapterWriter(config, model, network, build_component(config.saver), metadata, prepared.cache.memo),
        parts_in_memory=prepared.parts_in_memory,
        encodes_captions=prepared.encodes_captions,
        validation=ValidationSet.of(loader, prepared.validation, config),
        fingerprint=fingerprint,
    )


def build_model(config: TrainConfig, device: torch.device) -> DiffusionModel:
    """The base model with the noise process that the loss asks for, its weights not loaded yet.

    Raises ConfigError where the loss does not suit what the model predicts, or the device lacks what is asked for.
    """
    model, training = load_model(config, device), config.training
    problems = [*with_section(model.noise.spec.loss_problems(config.loss), "loss")]
    if training.fp8_base and device.type == "mps":
        problems.append(Problem("training.fp8_base", "cannot be used on mps, which lacks this dtype"))
    if training.cuda_graphs is True and device.type != "cuda":
        message = f"needs CUDA, and this run is on {device.type}"
        problems.append(Problem("training.cuda_graphs", message, 'leave it out, or use "auto"'))
    if training.compile is True and (reason := compile_unsupported_reason(training.compile_backend, device)):
        key = "compile" if training.compile_backend == "inductor" else "compile_backend"
        problems.append(Problem(f"training.{key}", reason))
    if problems:
        raise ConfigError(problems)
    for warning in _new_warnings(config, model, device):
        log.warning("%s", warning)
    model.noise = model.noise.for_loss(config.loss)
    return model


def load_model(config: TrainConfig, device: torch.device) -> DiffusionModel:
    """The base model in the dtypes of the run, its weights not loaded yet; nothing is checked."""
    model: DiffusionModel = build_component(config.model, device, precision_of(config.training, device).dtype)
    if config.training.quantization:
        model.quantize(config.training.quantization)
    if config.training.stream_base:
        model.stream(config.training.stream_base)
    return model


def _new_warnings(config: TrainConfig, model: DiffusionModel, device: torch.device) -> Iterator[Problem]:
    """What could not be seen from the config alone."""
    known = any(warning.key == "training.mixed_precision" for warning in hardware_warnings(config.training))
    if device.type == "cpu" and not known:
        warning = fp16_on_cpu(config.training, "PyTorch finds no accelerator")
        yield from [warning] if warning else []
    if config.training.device == "auto":
        for ineffective in config.training.ineffective_offload(device.type):
            yield evolve(ineffective, key=f"training.{ineffective.key}")
    if model.noise.spec != config.model.noise_process:
        yield from with_section(model.noise.spec.loss_warnings(config.loss), "loss")


def attach_network(model: DiffusionModel, config: TrainConfig) -> tuple[Network, FlatParameters]:
    """Set up how the model computes and attach the network, from the seed or from the file that the config names.

    Returns it with its trained parameters. Raises ConfigError where the optimizer does not support the learning rates.
    """
    training = config.training
    model.use_attention(build_component(config.attention))
    if training.gradient_checkpointing:
        model.enable_gradient_checkpointing(float(training.gradient_checkpointing))
    set_up_model(model, requested(training), training.compile_backend)

    targets = model.targets(config.trained_parts)
    network = _build_network(config, targets)
    network.initialize(training.seed)
    if config.network.weights is not None:
        tensors = load_initial_weights(config.network.weights, targets)
        network.load_adapter_state(tensors, str(config.network.weights))
    groups = network.train().parameter_groups(partial(_learning_rate, config))
    problems = list(config.optimizer.check_lrs([group.lr for group in groups]))
    if problems:
        raise ConfigError(problems)
    flat = FlatParameters(groups, precision_of(training, groups[0].parameters[0].device).dtype)
    network.use_flat(flat)
    return network, flat


def check_initial_weights(model: DiffusionModel, config: TrainConfig) -> None:
    """Raise `AdapterError` unless the file that the config starts from, if any, fits its network; reads no model."""
    if config.network.weights is None:
        return
    targets = model.empty_targets(config.trained_parts)
    tensors = load_initial_weights(config.network.weights, targets)
    try:
        network = _build_network(config, targets)
    except PluginError:  # a plugin may need the weights' numbers, and is checked once they are read
        return
    network.check_adapter_state(tensors, str(config.network.weights))


def _build_network(config: TrainConfig, targets: Sequence[AdaptationTarget]) -> Network:
    """The network on those of the layers that have a learning rate."""
    trained = [target for target in targets if _learning_rate(config, target)]
    network: Network = build_component(config.network, trained)
    return network


def _learning_rate(config: TrainConfig, target: AdaptationTarget) -> float:
    return config.optimizer.lr_for(target.encoder_index)


def clean_up(config: TrainConfig, processes: Distributed) -> None:
    """Remove what killed runs had begun to write in the folders of a run, before any of its processes writes there."""
    folders = [config.output.dir, state_folder(config), config.output.dir / "sample", config.cache_dir]
    for folder in (*folders, *config.cache_dir.glob("??")) if processes.is_main else ():
        remove_stale_temp_files(folder)
    processes.barrier()


def add_observers(handle: RunHandle, catalog: Catalog) -> None:
    """Add the observers that every run has, and those that the config names, if they run on this process.

    One that cannot be built is disabled with a warning, unless the run needs it.
    """
    named = {config.name for config in handle.config.observers}
    always = [catalog.find(ObserverConfig, name)() for name in DEFAULT_OBSERVERS if name not in named]
    for config in (*always, *handle.config.observers):
        if not (config.everywhere or handle.rank == 0):
            continue
        try:
            observer = build_component(config, handle)
        except PluginError as error:
            if config.essential:
                raise
            log.warning("observer disabled: %s", error)
        else:
            handle.observers.add(config.name, observer, essential=config.essential)


def dry_run_optimizer(config: TrainConfig, total_steps: int, device: torch.device) -> None:
    """Build optimizer and LR schedule for one number, so that their errors show before anything is encoded."""
    rates = {part.name: config.optimizer.lrs_for(part)[0] for part in config.model.parts_named(config.trained_parts)}
    groups = [
        ParameterGroup(part, part, (torch.nn.Parameter(torch.zeros(1, device=device)),), lr)
        for part, lr in rates.items()
    ]
    build_component(config.lr_scheduler, build_component(config.optimizer, groups), total_steps)
