"""From a config to a run, in phases that free what is no longer needed.

Index the data → encode what can be encoded once → free the encoders → read the denoiser, attach the
network → the loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from lorakit.api.components import ObserverConfig
from lorakit.api.observer import Observer
from lorakit.config.train_config import TrainConfig, TrainingSection
from lorakit.data.loader import BatchLoader
from lorakit.errors import ConfigError, Interrupted, PluginError
from lorakit.models.interfaces import AdaptationTarget, DiffusionModel
from lorakit.networks.adapter_file import load_initial_weights
from lorakit.networks.network import Network, ParameterGroup
from lorakit.plugins.build import build_component
from lorakit.plugins.catalog import Catalog
from lorakit.training.base_model import build_model
from lorakit.training.checkpoint.compatibility import RunFingerprint
from lorakit.training.checkpoint.state import find_state, forget_end, has_ended, note_end, state_folder
from lorakit.training.encode import Encoded, Filled, encode_data
from lorakit.training.loop import train
from lorakit.training.observers import Observers
from lorakit.training.output.adapter_writer import AdapterWriter
from lorakit.training.output.metadata import run_metadata
from lorakit.training.output.run_lock import run_lock
from lorakit.training.prepare import PreparedRun
from lorakit.training.run import Run
from lorakit.training.runtime.device import device_summary, device_warnings
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.runtime.memory_watch import MemoryPressureMonitor, pressure_probe
from lorakit.training.runtime.out_of_memory import memory_hint
from lorakit.training.schedule import Schedule
from lorakit.training.step.autotune import ExecutionMode
from lorakit.training.step.gradients import FlatGradients
from lorakit.training.step.numerics import deterministic_mode
from lorakit.training.summary import tell
from lorakit.training.validation import ValidationSet
from lorakit.utils.atomic_io import remove_stale_temp_files
from lorakit.utils.wording import file_size

log = logging.getLogger(__name__)

DEFAULT_OBSERVERS = ("checkpoints", "progress", "validation")
"""Observers that need not be named in the config; one that is replaces its default."""


def run_training(
    prepared: PreparedRun,
    catalog: Catalog,
    resume: Path | None = None,
    observers: Sequence[Observer] = (),
    stop: threading.Event | None = None,
) -> Path:
    """Train as the config of a prepared run says; gives the path of the final file.

    `resume` is the folder of a state; an empty path stands for the newest state of the run. `observers` hear of the run
    before those that the config names; `stop` ends it after a step. Raises OutputError while another run writes files
    of the same name to the same folder.
    """
    config = prepared.config
    if stop is not None and stop.is_set():
        raise Interrupted("Stopped before the first step.")
    # Before anything is computed: cuBLAS reads its part of it at its first product.
    with deterministic_mode(config.training.deterministic):
        processes = init_distributed(config.training)
        with run_lock(config.output) if processes.is_main else nullcontext():
            clean_up(config, processes)
            state = None
            if resume is not None:
                state = find_state(
                    RunFingerprint.of(prepared, processes.world_size), None if resume == Path() else resume
                )
                final = config.output.dir / f"{config.output.name}{build_component(config.saver).suffix}"
                if resume == Path() and final.is_file() and has_ended(state, prepared.length.total_steps):
                    log.warning("%s", _ended_already(config, prepared.length.total_steps, final))
                    return final
            run = _begin(prepared, catalog, processes, state)
            run.stop.event = stop
            # First, so that they know the step of what others save.
            for observer in reversed(observers if processes.is_main else ()):
                run.observers.add(type(observer).__name__, observer, first=True)
            try:
                train(run)
            finally:
                run.loader.cache.memo.save()
            if processes.is_main:
                note_end(state_folder(config), run.schedule.total_steps)
    return run.writer.path(config.output.name)


def init_distributed(training: TrainingSection) -> Distributed:
    """The processes of a run; the main one says what it trains on, and what does not suit that."""
    processes = Distributed.init(training.device, training.process_timeout)
    if processes.is_main:
        tell("device", device_summary(processes.device, training.mixed_precision, processes.world_size))
        for warning in device_warnings(training, processes.device):
            log.warning("%s", warning)
    return processes


def _begin(prepared: PreparedRun, catalog: Catalog, processes: Distributed, state: Path | None) -> Run:
    """The run at its first step, or where a state was saved, with its observers."""
    if state is None and processes.is_main:
        forget_end(state_folder(prepared.config))
    run = build_run(prepared, processes)
    if processes.is_main:
        tell("adapters", f"{len(run.network.adapters)}, {file_size(run.writer.size)} a file")
    if state is not None:
        run.load_state(state)
        log.info("going on from step %d of %d", run.step, run.schedule.total_steps)
    if processes.is_main:
        run.writer.write_config(catalog)
        run.observers = build_observers(run, catalog)
        run.observers.add(
            "memory", MemoryPressureMonitor(pressure_probe(run.processes.device), partial(memory_hint, run))
        )
    return run


def _ended_already(config: TrainConfig, total_steps: int, final: Path) -> str:
    """What to say to who resumes a run that has ended."""
    key = "training.max_epochs" if config.training.max_epochs else "training.max_steps"
    cure = f"to train on, raise {key}; to repeat the run, leave out --resume"
    return f"this run has ended already, after all of its {total_steps} steps: {final} ({cure})"


def fill_cache(prepared: PreparedRun) -> Mapping[str, Filled]:
    """Encode all images, and the captions where they stay the same over the run; gives how many were new."""
    config = prepared.config
    with deterministic_mode(config.training.deterministic):
        processes = init_distributed(config.training)
        clean_up(config, processes)
        return encode_data(prepared, build_model(config, processes.device), processes).filled


def build_run(prepared: PreparedRun, processes: Distributed) -> Run:
    """A run at its first step: caches filled, encoders freed, denoiser read, network attached."""
    config, started = prepared.config, time.time()
    model = build_model(config, processes.device)
    schedule = Schedule(prepared.datasets, config.training, processes)
    _rehearse(config, schedule.total_steps, processes.device)
    # Other processes could not read what is in the memory of one.
    prepared.cache.keeps_unwritten = processes.world_size == 1
    encoded = encode_data(prepared, model, processes)
    run = build_run_from(prepared, model, schedule, encoded, processes, started)
    run.identity = RunFingerprint.of(prepared, processes.world_size)
    return run


def build_run_from(
    prepared: PreparedRun,
    model: DiffusionModel,
    schedule: Schedule,
    encoded: Encoded,
    processes: Distributed,
    started: float,
) -> Run:
    """A run at its first step, on data that are encoded; it was started so many seconds after 1970."""
    config = prepared.config
    loader = _loader(prepared, model, schedule, encoded)
    network, groups = attach_network(model, config)
    optimizer = build_component(config.optimizer, groups)
    metadata = run_metadata(prepared, schedule, processes, optimizer, started)
    return Run(
        config=config,
        model=model,
        network=network,
        optimizer=optimizer,
        lr_scheduler=build_component(config.lr_scheduler, optimizer, schedule.total_steps),
        gradients=FlatGradients(groups),
        scaler=torch.amp.GradScaler(processes.device.type, enabled=config.training.mixed_precision == "fp16"),
        schedule=schedule,
        loader=loader,
        processes=processes,
        writer=AdapterWriter(config, model, network, build_component(config.saver), metadata),
        validation=ValidationSet.of(loader, prepared.validation, config),
    )


def attach_network(model: DiffusionModel, config: TrainConfig) -> tuple[Network, list[ParameterGroup]]:
    """The network, attached to the model, which is told how to compute; and what is trained."""
    _set_up(model, config)
    network = _attached_network(config, model)
    return network, _parameter_groups(config, network)


def clean_up(config: TrainConfig, processes: Distributed) -> None:
    """Remove what killed runs had begun to write in the folders of a run, before any of its processes writes there."""
    folders = [config.output.dir, state_folder(config), config.output.dir / "sample", config.cache_dir]
    for folder in (*folders, *config.cache_dir.glob("??")) if processes.is_main else ():
        remove_stale_temp_files(folder)
    processes.wait()


def build_observers(run: Run, catalog: Catalog) -> Observers:
    """The observers that every run has, and those that the config names.

    One that cannot be made is told of and left out, unless the run needs it.
    """
    named = {config.name for config in run.config.observers}
    always = [catalog.find(ObserverConfig, name)() for name in DEFAULT_OBSERVERS if name not in named]
    observers: list[tuple[str, bool, Observer]] = []
    for config in (*always, *run.config.observers):
        try:
            observers.append((config.name, config.essential, build_component(config, run.info)))
        except PluginError as error:
            if config.essential:
                raise
            log.warning("the run goes on without an observer: %s", error)
    return Observers(observers)


def _rehearse(config: TrainConfig, total_steps: int, device: torch.device) -> None:
    """Build optimizer and LR schedule for one number, so that what they refuse shows before anything is encoded."""
    rates = {part.name: config.optimizer.lrs_for(part)[0] for part in config.model.parts_named(config.trained_parts)}
    groups = [
        ParameterGroup(part, part, (torch.nn.Parameter(torch.zeros(1, device=device)),), lr)
        for part, lr in rates.items()
    ]
    build_component(config.lr_scheduler, build_component(config.optimizer, groups), total_steps)


def _loader(prepared: PreparedRun, model: DiffusionModel, schedule: Schedule, encoded: Encoded) -> BatchLoader:
    """What makes batches of the data, once that is encoded."""
    config = prepared.config
    return BatchLoader(
        datasets=prepared.datasets,
        cache=prepared.cache,
        seed=config.training.seed,
        num_timesteps=model.noise.num_timesteps,
        latent_keys=encoded.latent_keys,
        captions=encoded.captions,
        total_steps=schedule.total_steps,
        prior_loss_weight=config.data.prior_loss_weight,
        loss=config.loss,
        live=encoded.live,
    )


def _set_up(model: DiffusionModel, config: TrainConfig) -> None:
    """Say how the model is to compute."""
    model.use_attention(build_component(config.attention))
    if config.training.gradient_checkpointing:
        model.enable_gradient_checkpointing(float(config.training.gradient_checkpointing))
    ExecutionMode.certain(config.training).set_up(model, config.training.compile_backend)


def _attached_network(config: TrainConfig, model: DiffusionModel) -> Network:
    """The adapters in their places, from the seed or from the file that the config names."""
    targets = model.targets(config.trained_parts)
    network: Network = build_component(config.network, [target for target in targets if _learning_rate(config, target)])
    network.initialize(config.training.seed)
    if config.network.weights is not None:
        tensors = load_initial_weights(config.network.weights, targets)
        network.load_adapter_state(tensors, str(config.network.weights))
    return network.train()


def _parameter_groups(config: TrainConfig, network: Network) -> list[ParameterGroup]:
    """What is trained, with its learning rates. Raises ConfigError where the optimizer cannot have those."""
    groups = network.parameter_groups(partial(_learning_rate, config))
    problems = list(config.optimizer.check_lrs([group.lr for group in groups]))
    if problems:
        raise ConfigError(problems)
    return groups


def _learning_rate(config: TrainConfig, target: AdaptationTarget) -> float:
    """The learning rate of the adapter of a layer."""
    return config.optimizer.lr_for(target.encoder_index)
