"""A training run: what the loop works on, and where it is."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from attrs import define, field, frozen
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lorakit.api.observer import RunInfo
from lorakit.config.train_config import TrainConfig
from lorakit.data.loader import Batch, BatchLoader, prefetch
from lorakit.errors import Interrupted, LorakitError, NotSaved
from lorakit.models.interfaces import Conditioning, DiffusionModel
from lorakit.networks.network import Network
from lorakit.training.checkpoint.compatibility import RunFingerprint
from lorakit.training.checkpoint.resume import capture_state, restore
from lorakit.training.checkpoint.state import read_state, state_folder, write_state
from lorakit.training.conditioning import conditioning_of
from lorakit.training.observers import Observers
from lorakit.training.output.adapter_writer import AdapterWriter
from lorakit.training.output.fallback import save_with_fallback
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.runtime.out_of_memory import explain_oom
from lorakit.training.runtime.signals import StopRequest
from lorakit.training.schedule import Schedule, ScheduledStep
from lorakit.training.step.eval_weights import EvaluationWeights, begin_training
from lorakit.training.step.gradients import FlatGradients
from lorakit.training.step.metrics import AsyncMetrics, effective_lr
from lorakit.training.step.nan_guard import DivergenceMonitor, StepGuard, StepRecord
from lorakit.training.validation import ValidationSet, validation_loss

log = logging.getLogger(__name__)

PREFETCHED_BATCHES = 4


@frozen
class Step:
    """One optimizer step: this process's share of it."""

    scheduled: ScheduledStep
    batches: Iterator[Batch]
    """This process's micro-batches, on its device, weighted so that their losses add up to the step's."""
    images: list[tuple[str, ...]] = field(factory=list)
    """Names of the images of each of the batches learned from so far."""
    losses: list[Tensor] = field(factory=list)
    """What this process's part of the loss had come to after each of them, scalars on the device."""


@define(kw_only=True)
class Run:
    """All that the loop works on, and the step it has come to."""

    config: TrainConfig
    model: DiffusionModel
    network: Network
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    gradients: FlatGradients
    scaler: torch.amp.GradScaler
    schedule: Schedule
    loader: BatchLoader
    processes: Distributed
    writer: AdapterWriter
    validation: ValidationSet | None = None
    """Images that are held out from training."""
    observers: Observers = field(factory=Observers)
    stop: StopRequest = field(factory=StopRequest)
    identity: RunFingerprint = field(init=False)
    """What a state's run must have in common with this one; not there in a run that is only measured."""
    step: int = 0
    """Optimizer steps done."""
    first_step: int = 0
    """Steps done before, in a run that goes on from a state."""
    saved: tuple[int, Path] | None = None
    """The step of the last save and where it is; None before the first one of this session."""
    state_is_consistent: bool = True
    """Whether all that a state holds is that of `step`, which it is not while the next one's update goes on."""
    loss: Tensor = field(init=False)
    """Loss of the step so far: this process's part of the mean, a scalar that stays in its place on the device."""
    gradient_norm: Tensor = field(init=False)
    """Norm of the last step's gradients, a scalar on the device."""
    values: Mapping[str, Tensor] = field(factory=dict)
    """What the network has measured after the last step, scalars on the device."""
    guard: StepGuard = field(init=False)
    """Takes the optimizer's steps."""
    metrics: AsyncMetrics = field(init=False)
    """Reads the numbers of finished steps and tells the observers."""
    _weights: EvaluationWeights = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.stop.status = self.stopped_at_once
        self.loss = torch.zeros((), device=self.processes.device)
        self.gradient_norm = torch.zeros_like(self.loss)
        begin_training(self.optimizer)
        self._weights = EvaluationWeights(self.optimizer)
        skips = self.config.training.on_nonfinite == "skip"
        self.guard = StepGuard(self.optimizer, self.scaler, self.processes, skips=skips)
        judge = DivergenceMonitor(self.gradients.groups, skips, self.scaler.is_enabled(), self.processes.is_main)
        self.metrics = AsyncMetrics(self.processes, judge, partial(self.tell, "metrics_read"))

    @property
    def info(self) -> RunInfo:
        """What observers may know of the run, and do with it."""
        return RunInfo(
            config=self.config,
            total_steps=self.schedule.total_steps,
            first_step=self.step,
            total_epochs=self.schedule.total_epochs,
            steps_per_epoch=self.schedule.steps_per_epoch,
            images=sum(len(dataset.examples) for dataset in self.loader.datasets),
            encodes_captions=callable(self.loader.captions),
            save_adapter=self.save_adapter,
            save_state=self.save_state,
            evaluating=self.evaluating,
            validation_loss=partial(self._validation_loss, self.validation) if self.validation else None,
            paths=self.network.paths,
            tell=self.tell,
            training_seconds=self.training_seconds,
        )

    def tell(self, event: str, *values: object) -> None:
        """Tell all observers of an event."""
        self.observers.tell(event, *values)

    def training_seconds(self) -> float:
        """Seconds that steps have taken since the run started, what observers do not counted."""
        return self.observers.training_seconds()

    @contextmanager
    def evaluating(self) -> Iterator[DiffusionModel]:
        """The model as a saved file would make it: no gradients, no dropout, the optimizer's evaluation weights."""
        if not self.network.training:  # inside such a block: the outer one ends it
            yield self.model
            return
        self.network.eval()
        try:
            with torch.no_grad(), self._weights.reading():
                yield self.model
        finally:
            self.network.train()

    def _validation_loss(self, images: ValidationSet, timesteps: Sequence[int], max_batches: int | None) -> float:
        self._read_metrics_alone()
        return validation_loss(self, images, timesteps, max_batches)

    def _read_metrics_alone(self) -> None:
        """Read the numbers that wait, where that takes no other process."""
        if self.processes.world_size == 1:
            self.metrics.read()

    def save_adapter(self, stem: str, folder: Path | None = None) -> Path:
        """Write the adapters as they are now under a file name without extension; gives the path.

        They go to the output folder if no other is given. Raises OutputError when it takes no file.
        """
        self._read_metrics_alone()
        path = self.writer.path(stem, folder)
        with self.evaluating():
            self.writer.write(path, self.step, -(-self.step // self.schedule.steps_per_epoch))
        self.saved = self.step, path
        self.tell("adapter_saved", path)
        return path

    def save_state(self, folder: Path | None = None) -> Path:
        """Write all that is needed to go on from here; gives the state's own folder.

        It goes to the folder of the run's states if no other is given. Raises OutputError when it takes none.
        """
        self._read_metrics_alone()
        with self._weights.training():
            path = write_state(capture_state(self), self.identity, folder or state_folder(self.config))
        self.saved = self.step, path
        self.tell("state_saved", path)
        return path

    def load_state(self, folder: Path) -> None:
        """Put the run where it was when a state was saved. Raises ConfigError when that cannot be done."""
        restore(self, read_state(folder, self.processes.device), folder)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Listen for requests to stop and tell the observers of start and end."""
        try:
            with self.stop.listening(), explain_oom(self):
                self.observers.start(self.info)
                yield
                self.metrics.read()
                self.tell("run_finished")
            # Before observers close: what they still send may take longer than processes wait for each other.
            self.processes.wait()
        finally:
            self.observers.close()

    def remaining_steps(self) -> Iterator[Step]:
        """The steps that are left, each with this process's batches, prepared ahead of time.

        Raises Interrupted, when a whole state has been saved, after a request to stop.
        """
        batches = self.prefetched(self.schedule.batches_from(self.step, self.loader))
        try:
            for scheduled in self.schedule.steps_from(self.step):
                images: list[tuple[str, ...]] = []
                losses: list[Tensor] = []
                yield Step(scheduled, self._step_batches(batches, scheduled, images, losses), images, losses)
                if scheduled.ends_epoch:
                    self.tell("epoch_finished", scheduled.planned.epoch)
                self._stop_if_asked()
        finally:
            batches.close()

    def prefetched(self, batches: Iterable[Batch]) -> Generator[Batch]:
        """The batches, prepared ahead of time in memory from which the device takes them fastest."""
        # On a CPU a second thread that computes would slow the first one's OpenMP threads down by a tenth.
        depth = 0 if self.processes.device.type == "cpu" else PREFETCHED_BATCHES
        return prefetch(batches, depth, self.processes.device)

    def _step_batches(
        self, batches: Iterator[Batch], scheduled: ScheduledStep, images: list[tuple[str, ...]], losses: list[Tensor]
    ) -> Iterator[Batch]:
        """A step's batches; after each, its images and the loss so far are noted."""
        for _ in scheduled.shares:
            batch = next(batches)
            # The step's loss is a mean over all processes and micro-batches.
            yield batch.to(self.processes.device).scale_weights(batch.share / len(scheduled.planned.micro_batches))
            images.append(tuple(batch.images))
            losses.append(self.loss.clone())

    def encode(self, batch: Batch) -> Conditioning:
        """The batch's conditioning: from the cache, or from the text encoder as it is now."""
        return conditioning_of(batch, self.model, self.network, self.config.trains_text_encoders)

    def backward(self, loss: Tensor) -> None:
        """Add a part of the step's loss, and its gradients."""
        torch.autograd.backward(self.scaler.scale(loss))
        self.loss += loss.detach()

    def update(self) -> None:
        """Reduce and clip the gradients and take the optimizer's step."""
        self.state_is_consistent = False
        self.gradients.all_reduce(self.processes)
        self.guard.mark(self.gradients, self.loss)
        self.scaler.unscale_(self.optimizer)
        self.gradient_norm = self.gradients.clip(self.config.training.max_grad_norm)
        self.guard.step(self.gradient_norm)
        self.values = self.network.on_optimizer_step()
        self.gradients.zero()

    def step_finished(self, step: Step) -> None:
        """Count the step, move the learning rate and hand on the numbers."""
        self.step += 1
        rates = {group["name"]: effective_lr(group) for group in self.optimizer.param_groups}
        self.lr_scheduler.step()
        self.state_is_consistent = True
        epoch = step.scheduled.planned.epoch
        self.metrics.add(
            StepRecord(
                step=self.step,
                epoch=epoch,
                images=tuple(step.images),
                learning_rates=rates,
                loss=self.loss.clone(),
                losses=tuple(step.losses),
                gradient_norm=self.gradient_norm,
                group_norms=self.gradients.norms,
                values=self.values,
            )
        )
        self.loss.zero_()
        self.tell("step_finished", self.step)

    def stopped_at_once(self) -> str:
        """What to say of a run that ends with what it has saved so far; asks nothing of the device."""
        done = f"Stopped at step {self.step} of {self.schedule.total_steps}"
        if self.saved is None:
            since = f"step {self.first_step}, from which it was resumed" if self.first_step else "the start"
            return f"{done}; nothing was saved since {since}."
        step, path = self.saved
        return f"{done}; the last save is of step {step}: {path}"

    def _stop_if_asked(self) -> None:
        asked = self.stop.is_asked
        if self.processes.world_size > 1:
            # All processes must stop after the same step, whichever of them got the signal. They agree
            # when numbers are read, because asking makes the device wait.
            if self.metrics.waiting:
                return
            asked = bool(self.processes.sum(torch.tensor(float(asked), device=self.processes.device)).item())
        if not asked:
            return
        told = self._stopped() if self.processes.is_main else Interrupted()
        self.processes.wait()
        raise told

    def _stopped(self) -> LorakitError:
        """What to tell of a run that ends early, once its state is saved."""
        done = f"Stopped after step {self.step} of {self.schedule.total_steps}."
        try:
            saved = save_with_fallback(self.save_state, self.config.output.name)
        except NotSaved as error:
            return NotSaved(f"{done} No state of it could be saved: {error}")
        if saved.refusal:
            log.warning("%s", saved.refusal)
        return Interrupted(f"{done} The state is in {saved.path}", saved.path, is_found=not saved.refusal)
