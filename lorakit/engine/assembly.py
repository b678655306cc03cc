"""From a config to a run, in phases that free what is no longer needed.

Index the data → encode what can be encoded once → free the encoders → read the denoiser, attach the
network → the loop.
"""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from lorakit.components import ObserverConfig
from lorakit.config.sections import TrainConfig
from lorakit.data.batches import BatchLoader
from lorakit.engine.arithmetic import repeatable
from lorakit.engine.base_model import build_model
from lorakit.engine.building import built
from lorakit.engine.caching import Encoded, encode_data
from lorakit.engine.gradients import FlatGradients
from lorakit.engine.identity import RunIdentity
from lorakit.engine.metadata import run_metadata
from lorakit.engine.modes import Mode
from lorakit.engine.observing import Observer, Observers
from lorakit.engine.occupancy import only_run
from lorakit.engine.output import AdapterWriter
from lorakit.engine.preparation import PreparedRun
from lorakit.engine.processes import Processes
from lorakit.engine.run import Run
from lorakit.engine.schedule import Schedule
from lorakit.engine.shortage import advice
from lorakit.engine.spilling import SpillWatch, signs_on
from lorakit.engine.state import find_state, state_folder
from lorakit.engine.trainer import train
from lorakit.engine.validation import ValidationSet
from lorakit.errors import ConfigError, PluginError
from lorakit.files import remove_leftovers
from lorakit.models.protocol import AdaptationTarget, DiffusionModel
from lorakit.networks.network import Network, ParameterGroup
from lorakit.networks.saving import starting_tensors
from lorakit.plugins import Catalog

log = logging.getLogger(__name__)

EVERY_RUN_HAS = ("checkpoints", "progress", "validation")
"""Observers that need not be named in the config; one that is replaces its default."""


def train_prepared(prepared: PreparedRun, catalog: Catalog, resume: Path | None = None) -> Path:
    """Train as the config of a prepared run says; gives the path of the final file.

    `resume` is the folder of a state; an empty path stands for the newest state of the run. Raises OutputError
    while another run writes files of the same name to the same folder.
    """
    config = prepared.config
    processes = Processes.launched(config.training.device, config.training.process_timeout)
    alone = only_run(config.output) if processes.is_main else nullcontext()
    with alone, repeatable(config.training.deterministic):
        return _train_alone(prepared, catalog, processes, resume)


def _train_alone(prepared: PreparedRun, catalog: Catalog, processes: Processes, resume: Path | None) -> Path:
    """Train where no other run writes files of the same name."""
    config = prepared.config
    if processes.is_main:
        clean_up(config)
    state = None
    if resume is not None:
        state = find_state(RunIdentity.of(prepared, processes.world_size), None if resume == Path() else resume)
    run = assemble(prepared, processes)
    if state is not None:
        run.load_state(state)
        log.info("going on from step %d of %d", run.step, run.schedule.total_steps)
    if run.processes.is_main:
        run.writer.write_config(catalog)
        run.observers = build_observers(run, catalog)
        run.observers.add("memory", SpillWatch(signs_on(run.processes.device), partial(advice, run)))
    try:
        train(run)
    finally:
        run.loader.cache.memo.save()
    return run.writer.path(config.output.name)


def fill_cache(prepared: PreparedRun) -> None:
    """Encode all images, and the captions where they stay the same over the run."""
    config = prepared.config
    processes = Processes.launched(config.training.device, config.training.process_timeout)
    if processes.is_main:
        clean_up(config)
    with repeatable(config.training.deterministic):
        encode_data(prepared, build_model(config, processes.device), processes)


def assemble(prepared: PreparedRun, processes: Processes) -> Run:
    """A run at its first step: caches filled, encoders freed, denoiser read, network attached."""
    config, started = prepared.config, time.time()
    model = build_model(config, processes.device)
    schedule = Schedule(prepared.datasets, config.training, processes)
    _rehearse(config, schedule.total_steps, processes.device)
    # Other processes could not read what is in the memory of one.
    prepared.cache.keeps_unwritten = processes.world_size == 1
    encoded = encode_data(prepared, model, processes)
    run = assemble_with(prepared, model, schedule, encoded, processes, started)
    run.identity = RunIdentity.of(prepared, processes.world_size)
    return run


def assemble_with(
    prepared: PreparedRun,
    model: DiffusionModel,
    schedule: Schedule,
    encoded: Encoded,
    processes: Processes,
    started: float,
) -> Run:
    """A run at its first step, on data that are encoded; it was started so many seconds after 1970."""
    config = prepared.config
    loader = _loader(prepared, model, schedule, encoded)
    network, groups = adapt(model, config)
    optimizer = built(config.optimizer, groups)
    metadata = run_metadata(prepared, schedule, processes, optimizer, started)
    return Run(
        config=config,
        model=model,
        network=network,
        optimizer=optimizer,
        lr_scheduler=built(config.lr_scheduler, optimizer, schedule.total_steps),
        gradients=FlatGradients(groups),
        scaler=torch.amp.GradScaler(processes.device.type, enabled=config.training.mixed_precision == "fp16"),
        schedule=schedule,
        loader=loader,
        processes=processes,
        writer=AdapterWriter(config, model, network, built(config.saver), metadata),
        validation=ValidationSet.of(loader, prepared.validation, config),
    )


def adapt(model: DiffusionModel, config: TrainConfig) -> tuple[Network, list[ParameterGroup]]:
    """The network, attached to the model, which is told how to compute; and what is trained."""
    _set_up(model, config)
    network = _attached_network(config, model)
    return network, _parameter_groups(config, network)


def clean_up(config: TrainConfig) -> None:
    """Remove what killed runs had begun to write in the folders of a run."""
    folders = [config.output.dir, state_folder(config), config.output.dir / "sample", config.cache_dir]
    for folder in (*folders, *config.cache_dir.glob("??")):
        remove_leftovers(folder)


def build_observers(run: Run, catalog: Catalog) -> Observers:
    """The observers that every run has, and those that the config names.

    One that cannot be made is told of and left out, unless the run needs it.
    """
    named = {config.name for config in run.config.observers}
    always = [catalog.find(ObserverConfig, name)() for name in EVERY_RUN_HAS if name not in named]
    observers: list[tuple[str, bool, Observer]] = []
    for config in (*always, *run.config.observers):
        try:
            observers.append((config.name, config.essential, built(config, run.info)))
        except PluginError as error:
            if config.essential:
                raise
            log.warning("the run goes on without an observer: %s", error)
    return Observers(observers)


def _rehearse(config: TrainConfig, total_steps: int, device: torch.device) -> None:
    """Build optimizer and LR schedule for one number, so that what they refuse shows before anything is encoded."""
    groups = [
        ParameterGroup(part, part, (torch.nn.Parameter(torch.zeros(1, device=device)),), config.optimizer.lr_of(part))
        for part in config.trained_parts
    ]
    built(config.lr_scheduler, built(config.optimizer, groups), total_steps)


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
    model.use_attention(built(config.attention))
    if config.training.gradient_checkpointing:
        model.enable_gradient_checkpointing(float(config.training.gradient_checkpointing))
    Mode.certain(config.training).set_up(model, config.training.compile_backend)


def _attached_network(config: TrainConfig, model: DiffusionModel) -> Network:
    """The adapters in their places, from the seed or from the file that the config names."""
    targets = model.targets(config.trained_parts)
    network: Network = built(config.network, [target for target in targets if _learning_rate(config, target)])
    network.initialize(config.training.seed)
    if config.network.weights is not None:
        tensors = starting_tensors(config.network.weights, {target.key for target in targets})
        network.load_tensors(tensors, str(config.network.weights))
    return network.train()


def _parameter_groups(config: TrainConfig, network: Network) -> list[ParameterGroup]:
    """What is trained, with its learning rates. Raises ConfigError where the optimizer cannot have those."""
    groups = network.parameter_groups(partial(_learning_rate, config))
    problems = list(config.optimizer.problems_of_rates([group.lr for group in groups]))
    if problems:
        raise ConfigError(problems)
    return groups


def _learning_rate(config: TrainConfig, target: AdaptationTarget) -> float:
    """The learning rate of the adapter of a layer."""
    return config.optimizer.lr_of(target.part, target.position)
