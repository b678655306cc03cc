"""The training loop."""

from __future__ import annotations

from lorakit.training.run_handle import RunHandle
from lorakit.training.step.autotune import compile_step
from lorakit.training.step.numerics import numerics_of


def train(handle: RunHandle) -> None:
    """Train the network on the dataset, and report to the observers.

    Raises TrainingDiverged when the loss is no longer finite, and Interrupted after a request to
    stop, when a state has been saved.
    """
    run = handle.run
    with numerics_of(run), handle.session() as steps:
        forward_backward = compile_step(run)
        for step in steps:  # epochs, order and resuming are in there
            for batch in step.batches:
                forward_backward(batch)  # adds to the loss and the gradients
                step.record(batch, run.loss)
            run.update(step)  # reduce and clip the gradients, optimizer
            handle.step_finished(step)  # learning rate, refuses NaN, observers, requests to stop
