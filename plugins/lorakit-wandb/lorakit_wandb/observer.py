"""The observer `wandb`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen
from attrs import validators as v

from lorakit.api import Observer, ObserverConfig, RunInfo, StepMetrics, TrainConfig, hookimpl, to_tables


@frozen(kw_only=True)
class WandbConfig(ObserverConfig):
    """Logs on Weights & Biases; needs `wandb login` once, or WANDB_API_KEY in the environment."""

    name = "wandb"
    requires = ("wandb",)

    project: str = field(default="lorakit", validator=v.min_len(1))
    """Project of the run."""
    run_name: str | None = None
    """Name of the run; `output.name` when absent."""
    entity: str | None = None
    """Account or team of the project; your account when absent."""
    group: str | None = None
    """Group of the run; the runs of a group are shown together."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    notes: str | None = None
    """Notes about the run."""
    dir: Path | None = None
    """Folder for local logs; the output folder when absent."""

    def build(self, run_info: RunInfo) -> Wandb:  # noqa: ARG002
        """The observer of one run."""
        return Wandb(self)


class Wandb(Observer):
    """Logs metrics and images as they arrive, each with its step."""

    def __init__(self, config: WandbConfig) -> None:
        """Nothing is sent before the run starts."""
        self._config = config
        self._log: Any = None
        self._is_complete = False

    def run_started(self, run: RunInfo) -> None:
        """Start a run on Weights & Biases, with the config."""
        import wandb

        config, output = self._config, run.config.output
        folder = config.dir or output.dir
        folder.mkdir(parents=True, exist_ok=True)
        self._log = wandb.init(
            project=config.project, name=config.run_name or output.name, entity=config.entity, group=config.group,
            tags=config.tags, notes=config.notes, dir=folder, config=_tables(run.config),
            settings=wandb.Settings(console="off"),
        )  # fmt: skip
        # Metrics arrive some steps late, but the service's step counter must not decrease.
        self._log.define_metric("*", step_metric="step")

    def metrics_read(self, metrics: StepMetrics) -> None:
        """Log the metrics of a step."""
        rates = {f"lr/{name}": rate for name, rate in metrics.learning_rates.items()}
        numbers = {"epoch": metrics.epoch, "loss": metrics.loss, "gradient_norm": metrics.gradient_norm, **rates}
        self._log.log({"step": metrics.step, **numbers})

    def validated(self, step: int, losses: Mapping[str, float]) -> None:
        """Log the validation losses."""
        self._log.log({"step": step, **{f"validation/{name}": loss for name, loss in losses.items()}})

    def previews_drawn(self, step: int, paths: Sequence[Path]) -> None:
        """Log the previews."""
        import wandb

        self._log.log({"step": step, "previews": [wandb.Image(str(path), caption=path.stem) for path in paths]})

    def run_finished(self) -> None:
        """Note that the run is complete."""
        self._is_complete = True

    def closed(self) -> None:
        """Finish the run; one that stopped early is marked as failed."""
        if self._log is not None:
            self._log.finish(exit_code=0 if self._is_complete else 1)


def _tables(config: TrainConfig) -> Any:
    """The config as tables, with only the last component of each path, since logs may be public."""

    def public(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: public(item) for key, item in value.items()}
        if isinstance(value, list):
            return [public(item) for item in value]
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    return public(to_tables(config))


@hookimpl
def register_observers() -> list[type[ObserverConfig]]:
    """Weights & Biases."""
    return [WandbConfig]
