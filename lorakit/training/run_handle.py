"""A run from its first step to its end: what observers see of it, its saves, and how it stops."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from attrs import define, field

from lorakit.config.train_config import TrainConfig
from lorakit.errors import ConfigError, Interrupted, LorakitError, NotSaved, Problem
from lorakit.models.interfaces import AdaptationTarget, DiffusionModel
from lorakit.training.checkpoint.compatibility import fast_forward, warn_of_length
from lorakit.training.checkpoint.state import State, read_state, state_errors, state_folder, write_state
from lorakit.training.observers import Observers
from lorakit.training.output.folder import save_with_fallback
from lorakit.training.run import Run
from lorakit.training.runtime.out_of_memory import explain_oom
from lorakit.training.runtime.signals import StopRequest
from lorakit.training.schedule import Step
from lorakit.training.step.metrics import AsyncMetrics
from lorakit.training.step.nan_guard import DivergenceMonitor
from lorakit.training.validation import validation_loss

log = logging.getLogger(__name__)

T = TypeVar("T")


@define(eq=False)
class RunHandle:
    """A run with its observers; to them it is the `RunInfo` of `lorakit.api`."""

    run: Run
    observers: Observers = field(factory=Observers)
    """Those that hear of the run; more may be added until it starts."""
    stop: StopRequest = field(factory=StopRequest)
    """Requests to end the run after a step."""
    _metrics: AsyncMetrics = field(init=False)

    def __attrs_post_init__(self) -> None:
        run = self.run
        skips = run.config.training.on_nonfinite == "skip"
        monitor = DivergenceMonitor(run.gradients.groups, skips, run.scaler.is_enabled(), run.processes.is_main)
        self._metrics = AsyncMetrics(run.processes, monitor, partial(self.tell, "metrics_read"))

    @property
    def config(self) -> TrainConfig:
        """The resolved config."""
        return self.run.config

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.run.schedule.total_steps

    @property
    def first_step(self) -> int:
        """Steps done before, more than zero in a resumed run."""
        return self.run.first_step

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run, the last one possibly cut short."""
        return self.run.schedule.total_epochs

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch."""
        return self.run.schedule.steps_per_epoch

    @property
    def images(self) -> int:
        """Images in the dataset, repeats not counted."""
        return sum(len(dataset.examples) for dataset in self.run.loader.datasets)

    @property
    def encodes_captions(self) -> bool:
        """Whether captions are encoded in each step."""
        return self.run.encodes_captions

    @property
    def holds_out_images(self) -> bool:
        """Whether images are held out from training, for validation."""
        return self.run.validation is not None

    @property
    def targets(self) -> Sequence[AdaptationTarget]:
        """The layers that have adapters, with their names in LoRA files of all layouts."""
        return self.run.network.targets

    def tell(self, event: str, *values: object) -> None:
        """Notify all observers of an event."""
        self.observers.notify(event, *values)

    def training_seconds(self) -> float:
        """Seconds that steps have taken since the run started, without the time that observers took."""
        return self.observers.training_seconds()

    def evaluating(self) -> AbstractContextManager[DiffusionModel]:
        """The model as a saved file would make it: no gradients, no dropout, the optimizer's evaluation weights."""
        return self.run.evaluating()

    @property
    def rank(self) -> int:
        """The number of this process; 0 is the main process."""
        return self.run.processes.rank

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return self.run.processes.world_size

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on each process, by rank; what raises on one raises on all. All must call this."""
        return self.run.processes.together(work)

    def validation_loss(self, timesteps: Sequence[float], max_batches: int | None = None) -> float:
        """The mean loss on held-out images at these timesteps. Raises ValueError where none are held out."""
        return self._validation_loss(timesteps, max_batches)

    def shared_validation_loss(self, timesteps: Sequence[float], max_batches: int | None = None) -> float:
        """The same, of which each process computes a part; all must call it."""
        return self._validation_loss(timesteps, max_batches, shared=True)

    def _validation_loss(self, timesteps: Sequence[float], max_batches: int | None, shared: bool = False) -> float:
        if self.run.validation is None:
            raise ValueError("no images are held out")
        self._read_metrics_alone()
        return validation_loss(self.run, self.run.validation, timesteps, max_batches, shared=shared)

    def save_adapter(
        self, stem: str, folder: Path | None = None, metadata: Mapping[str, str] = MappingProxyType({})
    ) -> Path:
        """Save the adapters as they are now under a file name without extension; returns the path.

        The default folder is the output folder; `metadata` is added to the file's. Raises OutputError when the file
        cannot be written.
        """
        self._read_metrics_alone()
        run = self.run
        path = run.writer.path(stem, folder)
        with self.evaluating():
            run.writer.write(path, run.step, -(-run.step // run.schedule.steps_per_epoch), metadata)
        self.tell("adapter_saved", path)
        return path

    def save_state(self, folder: Path | None = None) -> Path:
        """Save all that is needed to resume from here; returns the state's own folder.

        The default is the folder of the run's states. Raises OutputError when the state cannot be written.
        """
        run = self.run
        if run.fingerprint is None:
            raise ValueError("this run saves no states")
        self._read_metrics_alone()
        with run.weights.train_weights():
            state_dicts = {
                "optimizer": run.optimizer.state_dict(),
                "lr_scheduler": run.lr_scheduler.state_dict(),
                "scaler": run.scaler.state_dict(),
                **({} if run.average is None else {"ema": run.average.state_dict()}),
            }
            state = State(run.step, run.schedule.total_steps, run.network.adapter_state(), state_dicts)
            path = write_state(state, run.fingerprint, folder or state_folder(self.config))
        self.tell("state_saved", path)
        return path

    def load_state(self, folder: Path) -> None:
        """Put the run where it was when a state was saved.

        Raises ConfigError when the run is too short for it, or the state is damaged.
        """
        run, total = self.run, self.total_steps
        state = read_state(folder, run.processes.device)
        if state.step > total:
            key = "training.max_epochs" if run.config.training.max_epochs else "training.max_steps"
            problem = f"gives {total} steps, but the state in {folder} has reached step {state.step}"
            raise ConfigError([Problem(key, problem, "make the run longer, or resume another state")])
        first_rates = [group["lr"] for group in run.optimizer.param_groups]
        with state_errors(folder):
            run.network.load_adapter_state(state.tensors)
            run.optimizer.load_state_dict(state.state_dicts["optimizer"])
            run.scaler.load_state_dict(state.state_dicts["scaler"])
            if run.average is not None:
                run.average.load_state_dict(state.state_dicts["ema"])
            if total == state.total_steps:
                run.lr_scheduler.load_state_dict(state.state_dicts["lr_scheduler"])
            else:
                fast_forward(run.lr_scheduler, first_rates, state.step)
        warn_of_length(run.config, state.step, state.total_steps, total)
        run.step = run.first_step = state.step

    @contextmanager
    def session(self) -> Iterator[Iterator[Step]]:
        """The steps that are left, with this process's batches, prepared ahead of time.

        Requests to stop are listened to meanwhile, and the observers are notified of start and end.
        """
        run = self.run
        try:
            with self.stop.listening(), explain_oom(run, self.save_state):
                self.observers.start(self)
                with closing(run.prefetched(run.schedule.batches_from(run.step, run.loader))) as batches:
                    yield run.schedule.steps_from(run.step, batches)
                self._metrics.read()
                self.tell("run_finished")
            # Before observers close: what they still send may take longer than processes wait for each other.
            run.processes.barrier()
        finally:
            self.observers.close()

    def step_finished(self, step: Step) -> None:
        """Count the step, check its numbers, and notify the observers.

        Raises TrainingDiverged when the loss is not finite, and after a request to stop Interrupted, once a state is
        saved.
        """
        self.run.advance(step)
        self._metrics.add(step)
        self.tell("step_finished", self.run.step)
        if step.plan.ends_epoch:
            self.tell("epoch_finished", step.plan.epoch)
        processes, asked = self.run.processes, self.stop.is_asked
        if processes.world_size > 1:
            # All processes must stop after the same step, whichever of them got the signal. They agree
            # when numbers are read, because asking makes the device wait.
            if self._metrics.pending:
                return
            asked = bool(processes.all_reduce_sum(torch.tensor(float(asked), device=processes.device)).item())
        if asked:
            reason = self._stopped() if processes.is_main else Interrupted()
            processes.barrier()
            raise reason

    def _read_metrics_alone(self) -> None:
        """Read pending numbers, where that does not involve other processes."""
        if self.run.processes.world_size == 1:
            self._metrics.read()

    def _stopped(self) -> LorakitError:
        """Save a state of a run that ends early; returns the error that says where it is."""
        done = f"Stopped after step {self.run.step} of {self.total_steps}."
        try:
            saved = save_with_fallback(self.save_state, self.config.output.name)
        except NotSaved as error:
            return NotSaved(f"{done} No state of it could be saved: {error}")
        if saved.refusal:
            log.warning("%s", saved.refusal)
        return Interrupted(f"{done} The state is in {saved.path}", saved.path, is_found=not saved.refusal)
