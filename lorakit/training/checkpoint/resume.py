"""From a run to a state, and back."""

from __future__ import annotations

from pathlib import Path

from lorakit.errors import ConfigError, Problem
from lorakit.training.checkpoint.compatibility import fast_forward, warn_of_length
from lorakit.training.checkpoint.state import State, state_errors
from lorakit.training.run import Run


def capture_state(run: Run) -> State:
    """All that is needed to resume from the step that a run has reached."""
    state_dicts = {
        "optimizer": run.optimizer.state_dict(),
        "lr_scheduler": run.lr_scheduler.state_dict(),
        "scaler": run.scaler.state_dict(),
    }
    return State(run.step, run.schedule.total_steps, run.network.adapter_state(), state_dicts)


def restore(run: Run, state: State, folder: Path) -> None:
    """Put a run where it was when a state was saved, which was read from a folder.

    Raises ConfigError when the run is too short for it, or the state is damaged.
    """
    total = run.schedule.total_steps
    if state.step > total:
        key = "training.max_epochs" if run.config.training.max_epochs else "training.max_steps"
        problem = f"gives {total} steps, but the state in {folder} has reached step {state.step}"
        raise ConfigError([Problem(key, problem, "make the run longer, or resume another state")])
    first_rates = [group["lr"] for group in run.optimizer.param_groups]
    with state_errors(folder):
        run.network.load_adapter_state(state.tensors)
        run.optimizer.load_state_dict(state.state_dicts["optimizer"])
        run.scaler.load_state_dict(state.state_dicts["scaler"])
        if total == state.total_steps:
            run.lr_scheduler.load_state_dict(state.state_dicts["lr_scheduler"])
        else:
            fast_forward(run.lr_scheduler, first_rates, state.step)
    warn_of_length(run.config, state.step, state.total_steps, total)
    run.step = run.first_step = state.step
