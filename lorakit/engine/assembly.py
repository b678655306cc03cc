"""From a config to a run, in phases that free what is no longer needed.

Index the data → encode what can be encoded once → free the encoders → read the denoiser, attach the
network → the loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from lorakit.components import ObserverConfig
from lorakit.config.sections import TrainConfig, TrainingSection
from lorakit.data.batches import BatchLoader
from lorakit.data.encoding import CaptionKeys, Encoding, LatentKeys, encode_captions, encode_latents
from lorakit.data.examples import any_augmented, captions_vary, default_workers
from lorakit.data.latents import LiveEncoder
from lorakit.engine.gradients import FlatGradients
from lorakit.engine.hardware import doubts, fp16_on_cpu
from lorakit.engine.metadata import run_metadata
from lorakit.engine.observing import Observers
from lorakit.engine.output import AdapterWriter
from lorakit.engine.preparation import PreparedRun
from lorakit.engine.processes import Processes
from lorakit.engine.run import Run
from lorakit.engine.schedule import Schedule
from lorakit.engine.state import find_state
from lorakit.engine.trainer import train
from lorakit.engine.validation import ValidationSet
from lorakit.errors import ConfigError, Problem
from lorakit.models.compilation import why_not
from lorakit.models.protocol import AdaptationTarget, DiffusionModel, Tokens
from lorakit.networks.network import Network, ParameterGroup
from lorakit.networks.saving import starting_tensors
from lorakit.plugins import Catalog

log = logging.getLogger(__name__)

Captions = CaptionKeys | Callable[[Sequence[str]], Tokens]
"""Where captions are in the cache, or what tokenizes them in each step."""

EVERY_RUN_HAS = ("checkpoints", "progress", "validation")
"""Observers that need not be named in the config; one that is replaces its default."""

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train_prepared(prepared: PreparedRun, catalog: Catalog, resume: Path | None = None) -> Path:
    """Train as the config of a prepared run says; gives the path of the final file.

    `resume` is the folder of a state; an empty path stands for the newest state of the run.
    """
    config = prepared.config
    state = find_state(config, None if resume == Path() else resume) if resume is not None else None
    run = assemble(prepared, Processes.launched(config.training.device, config.training.process_timeout))
    if state is not None:
        run.load_state(state)
        log.info("going on from step %d of %d", run.step, run.schedule.total_steps)
    if run.processes.is_main:
        run.writer.write_config(catalog)
        run.observers = build_observers(run, catalog)
    try:
        train(run)
    finally:
        run.loader.cache.memo.save()
    return run.writer.path(config.output.name)


def fill_cache(prepared: PreparedRun) -> None:
    """Encode all images, and the captions where they stay the same over the run."""
    config = prepared.config
    processes = Processes.launched(config.training.device, config.training.process_timeout)
    _encoded(prepared, build_model(config, processes.device), processes)


def build_model(config: TrainConfig, device: torch.device) -> DiffusionModel:
    """The base model with the noise process that the loss asks for, its weights not read yet.

    Raises ConfigError where the loss does not suit what the model predicts, or the device cannot do what is asked.
    """
    model = config.model.build(device, DTYPES[config.training.mixed_precision])
    if config.training.fp8_base:
        model.keep_in_8_bits(config.training.fp8_base)
    problems = [
        *config.loss.problems_with(model.noise.prediction, model.noise.num_timesteps),
        *_problems_of_the_device(config.training, device),
    ]
    if problems:
        raise ConfigError(problems)
    if config.prediction is None:
        for warning in config.loss.warnings_with(model.noise.prediction):
            log.warning("%s", warning)
    if config.loss.zero_terminal_snr:
        model.noise = model.noise.with_zero_terminal_snr()
    return model


def _problems_of_the_device(training: TrainingSection, device: torch.device) -> Iterator[Problem]:
    if training.fp8_base and device.type == "mps":
        yield Problem("training.fp8_base", "cannot be used on mps, which lacks the number format")
    if training.compile and (reason := why_not(training.compile_backend, device)):
        key = "compile" if training.compile_backend == "inductor" else "compile_backend"
        yield Problem(f"training.{key}", reason)


def assemble(prepared: PreparedRun, processes: Processes) -> Run:
    """A run at its first step: caches filled, encoders freed, denoiser read, network attached."""
    config, started = prepared.config, time.time()
    if processes.device.type == "cpu" and doubts(config.training) is None:
        doubt = fp16_on_cpu(config.training, "PyTorch finds no accelerator")
        if doubt:
            log.warning("%s", doubt)
    model = build_model(config, processes.device)
    schedule = Schedule(prepared.datasets, config.training, processes)
    _rehearse(config, schedule.total_steps, processes.device)
    latent_keys, captions = _encoded(prepared, model, processes)
    loader = BatchLoader(
        datasets=prepared.datasets,
        cache=prepared.cache,
        seed=config.training.seed,
        num_timesteps=model.noise.num_timesteps,
        latent_keys=latent_keys,
        captions=captions,
        total_steps=schedule.total_steps,
        prior_loss_weight=config.data.prior_loss_weight,
        loss=config.loss,
        live=_live_encoder(prepared, model, processes),
    )
    model.use_attention(config.attention.build())
    if config.training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.training.compile:
        model.compile(config.training.compile_backend)
    network = _attached_network(config, model)
    groups = network.parameter_groups(partial(_learning_rate, config))
    problems = list(config.optimizer.problems_with([group.lr for group in groups]))
    if problems:
        raise ConfigError(problems)
    optimizer = config.optimizer.build(groups)
    metadata = run_metadata(prepared, schedule, processes, optimizer, started)
    return Run(
        config=config,
        model=model,
        network=network,
        optimizer=optimizer,
        lr_scheduler=config.lr_scheduler.build(optimizer, schedule.total_steps),
        gradients=FlatGradients([parameter for group in groups for parameter in group.parameters]),
        scaler=torch.amp.GradScaler(processes.device.type, enabled=config.training.mixed_precision == "fp16"),
        schedule=schedule,
        loader=loader,
        processes=processes,
        writer=AdapterWriter(config, model, network, config.saver.build(), metadata),
        validation=ValidationSet.of(loader, prepared.validation, config),
    )


def build_observers(run: Run, catalog: Catalog) -> Observers:
    """The observers that every run has, and those that the config names."""
    named = {config.name for config in run.config.observers}
    always = [catalog.find(ObserverConfig, name)() for name in EVERY_RUN_HAS if name not in named]
    return Observers(
        (config.name, config.essential, config.build(run.info)) for config in (*always, *run.config.observers)
    )


def _encoded(prepared: PreparedRun, model: DiffusionModel, processes: Processes) -> tuple[LatentKeys, Captions]:
    """Where in the cache latents and captions are, once they are encoded; frees encoders that are not needed any more.

    For captions that are encoded in each step, it is the text encoder's `tokenize`.
    """
    config, datasets, cache = prepared.config, (*prepared.datasets, *prepared.validation), prepared.cache
    model.memo = cache.memo
    with _progress("encoding images", processes) as progress:
        latent_keys = encode_latents(datasets, model, cache, _encoding(config, processes, progress))
    if not any_augmented(datasets):
        model.free("image_encoder")
    captions: Captions
    if "text_encoder" in config.trained_parts or captions_vary(datasets):
        captions = partial(model.text_encoder.tokenize, weighted=config.data.weighted_captions)
    else:
        with _progress("encoding captions", processes) as progress:
            captions = encode_captions(datasets, model, cache, _encoding(config, processes, progress))
        model.free("text_encoder")
    cache.memo.save()
    processes.wait()
    return latent_keys, captions


def _live_encoder(prepared: PreparedRun, model: DiffusionModel, processes: Processes) -> LiveEncoder | None:
    """What encodes images that change from epoch to epoch; None where there are none."""
    if not any_augmented(prepared.datasets):
        return None
    data = prepared.config.data
    return LiveEncoder(
        encoder=model.image_encoder,
        device=processes.device,
        batch_size=data.encode_batch_size,
        workers=data.workers or default_workers(),
    )


def _encoding(config: TrainConfig, processes: Processes, progress: Callable[[int, int], None]) -> Encoding:
    return Encoding(
        device=processes.device,
        batch_size=config.data.encode_batch_size,
        workers=config.data.workers,
        rank=processes.rank,
        world_size=processes.world_size,
        weighted_captions=config.data.weighted_captions,
        progress=progress,
    )


@contextmanager
def _progress(title: str, processes: Processes) -> Iterator[Callable[[int, int], None]]:
    """A callback that draws a progress bar from its first call on; on the main process only."""
    from tqdm import tqdm

    bar = tqdm(desc=title, disable=not processes.is_main, delay=0.5, dynamic_ncols=True)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        bar.close()


def _rehearse(config: TrainConfig, total_steps: int, device: torch.device) -> None:
    """Build optimizer and LR schedule for one number, so that what they refuse shows before anything is encoded."""
    groups = [
        ParameterGroup(part, part, (torch.nn.Parameter(torch.zeros(1, device=device)),), config.optimizer.lr_of(part))
        for part in config.trained_parts
    ]
    config.lr_scheduler.build(config.optimizer.build(groups), total_steps)


def _attached_network(config: TrainConfig, model: DiffusionModel) -> Network:
    """The adapters in their places, from the seed or from the file that the config names."""
    targets = model.targets(config.trained_parts)
    network = config.network.build([target for target in targets if _learning_rate(config, target)])
    network.initialize(config.training.seed)
    if config.network.weights is not None:
        network.load_tensors(starting_tensors(config.network.weights), str(config.network.weights))
    return network.train()


def _learning_rate(config: TrainConfig, target: AdaptationTarget) -> float:
    """The learning rate of the adapter of a layer."""
    return config.optimizer.lr_of(target.part, target.position)
