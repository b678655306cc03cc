"""The training loop."""

from __future__ import annotations

from lorakit.engine.loss import denoising_loss
from lorakit.engine.run import Run


def train(run: Run) -> None:
    """Fit the network to the dataset, telling the observers as it goes.

    Raises TrainingDiverged when the loss is no longer finite, and Interrupted after a request to
    stop, when a whole state has been saved.
    """
    with run.watched():
        for step in run.remaining_steps():  # epochs, order and resuming live there
            for batch in step.batches:
                loss = denoising_loss(run.model, batch, run.encode(batch), run.config.loss)
                run.backward(loss * step.share_of(batch))
            run.update()  # clip, optimizer
            run.step_finished(step)  # counts, learning rate, refuses NaN, tells the observers
