"""From a run to a state, and from a state to where the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import ConfigError, Problem
from lorakit.training.checkpoint.length import follow, warn_of_length
from lorakit.training.checkpoint.state import State, state_errors

if TYPE_CHECKING:
    from lorakit.training.run import Run


def capture_state(run: Run) -> State:
    """All that is needed to go on from the step that a run has come to."""
    machinery = {
        "optimizer": run.optimizer.state_dict(),
        "lr_scheduler": run.lr_scheduler.state_dict(),
        "scaler": run.scaler.state_dict(),
    }
    return State(run.step, run.schedule.total_steps, run.network.adapter_state(), machinery)


def restore(run: Run, state: State, folder: Path) -> None:
    """Put a run where it was when a state was saved, which was read from a folder.

    Raises ConfigError when the run is too short for it, or the state is damaged.
    """
    total = run.schedule.total_steps
    if state.step > total:
        key = "training.max_epochs" if run.config.training.max_epochs else "training.max_steps"
        problem = f"gives {total} steps, but the state in {folder} has come to step {state.step}"
        raise ConfigError([Problem(key, problem, "let the run be longer, or take up another state")])
    first_rates = [group["lr"] for group in run.optimizer.param_groups]
    with state_errors(folder):
        run.network.load_adapter_state(state.tensors)
        run.optimizer.load_state_dict(state.machinery["optimizer"])
        run.scaler.load_state_dict(state.machinery["scaler"])
        if total == state.total_steps:
            run.lr_scheduler.load_state_dict(state.machinery["lr_scheduler"])
        else:
            follow(run.lr_scheduler, first_rates, state.step)
    warn_of_length(run.config, state.step, state.total_steps, total)
    run.step = run.first_step = state.step
