"""The training loop."""

from __future__ import annotations

from functools import partial

from lorakit.data.loader import Batch
from lorakit.training.run import Run
from lorakit.training.step.autotune import compile_step
from lorakit.training.step.loss import denoising_loss


def train(run: Run) -> None:
    """Fit the network to the dataset, telling the observers as it goes.

    Raises TrainingDiverged when the loss is no longer finite, and Interrupted after a request to
    stop, when a whole state has been saved.
    """
    with compile_step(run, partial(forward_backward, run)) as learn, run.watched():
        for step in run.remaining_steps():  # epochs, order and resuming live there
            for batch in step.batches:
                learn(batch)
            run.update()  # clip, optimizer
            run.step_finished(step)  # counts, learning rate, refuses NaN, tells the observers


def forward_backward(run: Run, batch: Batch) -> None:
    """Add a micro-batch's part of the step's loss, and its gradients."""
    loss = denoising_loss(run.model, batch, run.encode(batch), run.criterion)
    run.backward(loss)
