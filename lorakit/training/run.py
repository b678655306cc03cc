"""A training run: what the loop works on, and the computations of one step."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager

import torch
from attrs import define, field
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lorakit.config.train_config import TrainConfig
from lorakit.data.loader import Batch, BatchLoader, prefetch
from lorakit.models.interfaces import Conditioning, DiffusionModel
from lorakit.models.memory.compile import compilation_paused
from lorakit.networks.flat_parameters import FlatParameters
from lorakit.networks.network import Network
from lorakit.training.checkpoint.compatibility import RunFingerprint
from lorakit.training.encode import conditioning_of
from lorakit.training.output.adapter_writer import AdapterWriter
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.schedule import Schedule, Step
from lorakit.training.step.eval_weights import EvaluationWeights, begin_training
from lorakit.training.step.gradients import FlatGradients
from lorakit.training.step.loss import Criterion, denoising_loss
from lorakit.training.step.metrics import effective_lr
from lorakit.training.step.moving_average import MovingAverage
from lorakit.training.step.nan_guard import StepGuard
from lorakit.training.step.numerics import cudnn_benchmark
from lorakit.training.validation import ValidationSet

PREFETCHED_BATCHES = 4


@define(kw_only=True)
class Run:
    """All that the loop works on, and the step it has reached."""

    config: TrainConfig
    model: DiffusionModel
    network: Network
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    flat: FlatParameters
    """The trained parameters, and the copy that layers compute with."""
    gradients: FlatGradients
    scaler: torch.amp.GradScaler
    schedule: Schedule
    loader: BatchLoader
    processes: Distributed
    writer: AdapterWriter
    parts_in_memory: tuple[str, ...]
    """Parts of the base model that can be adapted and are in memory during training."""
    encodes_captions: bool
    """Whether captions are encoded in each step."""
    validation: ValidationSet | None = None
    """Images that are held out from training."""
    fingerprint: RunFingerprint | None = None
    """What a state's run must have in common with this one; None in a run that saves no states."""
    step: int = 0
    """Optimizer steps done."""
    first_step: int = 0
    """Steps done before, in a resumed run."""
    state_is_consistent: bool = True
    """Whether all that a state holds is that of `step`; False while the update of the next one is under way."""
    uses_cuda_graphs: bool = False
    """Whether micro-batches are captured and replayed."""
    loss: Tensor = field(init=False)
    """This process's part of the step's mean loss so far, a scalar in a fixed place on the device."""
    criterion: Criterion = field(init=False)
    """The loss, built for the model's noise process."""
    guard: StepGuard = field(init=False)
    """Takes the optimizer's steps."""
    weights: EvaluationWeights = field(init=False)
    """Switches between the weights that are trained and those that are saved."""
    average: MovingAverage | None = field(init=False)
    """The same, where those that are saved are an average over the steps."""

    def __attrs_post_init__(self) -> None:
        self.loss = torch.zeros((), device=self.processes.device)
        self.criterion = Criterion.of(self.config.loss, self.model.noise)
        begin_training(self.optimizer)
        ema = self.config.network.ema
        self.average = None if ema is None else MovingAverage(self.optimizer, self.flat.weights, ema)
        self.weights = self.average or EvaluationWeights(self.optimizer)
        skips = self.config.training.on_nonfinite == "skip"
        self.guard = StepGuard(self.optimizer, self.scaler, self.processes, skips=skips)

    def forward_backward(self, batch: Batch) -> None:
        """Add a micro-batch's part of the step's loss, and its gradients."""
        self.flat.refresh()
        self.network.begin_batch(batch.sample_seeds)  # keys its dropout
        self.backward(denoising_loss(self.model, batch, self.encode(batch), self.criterion))

    def encode(self, batch: Batch) -> Conditioning:
        """The batch's conditioning: from the cache, or from the text encoder as it is now."""
        return conditioning_of(batch, self.model, self.config.trains_text_encoders)

    def backward(self, loss: Tensor) -> None:
        """Add a part of the step's loss, and its gradients."""
        try:
            torch.autograd.backward(self.scaler.scale(loss))
        finally:  # also after an error, so that the next backward pass finds nothing of this one
            self.flat.collect()
        self.loss += loss.detach()

    def update(self, step: Step) -> None:
        """Reduce and clip the gradients and take the optimizer's step."""
        self.state_is_consistent = False
        self.gradients.all_reduce(self.processes, in_bf16=self.config.training.reduce_dtype == "bf16")
        self.guard.mark(self.gradients, self.loss)
        self.scaler.unscale_(self.optimizer)
        step.gradient_norm = self.gradients.clip(self.config.training.max_grad_norm)
        step.group_norms = self.gradients.norms
        self.guard.step(step.gradient_norm)
        step.values = self.network.on_optimizer_step()
        if self.average is not None:
            self.average.update(self.step + 1, step.gradient_norm)
        self.gradients.zero()
        step.loss = self.loss.clone()
        self.loss.zero_()

    def advance(self, step: Step) -> None:
        """Count the step and move the learning rate."""
        self.step += 1
        step.learning_rates = {group["name"]: effective_lr(group) for group in self.optimizer.param_groups}
        self.lr_scheduler.step()
        self.state_is_consistent = True

    @contextmanager
    def evaluating(self) -> Iterator[DiffusionModel]:
        """The model as a saved file would make it: no gradients, no dropout, the optimizer's evaluation weights."""
        if not self.network.training:  # inside such a block: the outer one ends it
            yield self.model
            return
        self.network.eval()
        try:
            with (
                torch.no_grad(),
                self.weights.eval_weights(),
                # Previews have other shapes, each of which would take longer to prepare for than to compute.
                compilation_paused(bool(self.config.training.compile)),
                cudnn_benchmark(False),
            ):
                self.flat.refresh()
                yield self.model
        finally:
            self.network.train()

    def prefetched(self, batches: Iterable[Batch]) -> Generator[Batch]:
        """The batches, prepared ahead of time in memory from which the device takes them fastest."""
        # On a CPU a second thread that computes would slow the first one's OpenMP threads down by a tenth.
        depth = 0 if self.processes.device.type == "cpu" else PREFETCHED_BATCHES
        return prefetch(batches, depth, self.processes.device)
