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
    """Project that the run belongs to."""
    run_name: str | None = None
    """Name of the run; `output.name` when absent."""
    entity: str | None = None
    """Account or team that the project belongs to; your own account when absent."""
    group: str | None = None
    """Runs of the same group are shown together."""
    tags: tuple[str, ...] = ()
    """Words to find the run by."""
    notes: str | None = None
    """A remark about the run."""
    dir: Path | None = None
    """Folder for the logs before they are uploaded; the output folder when absent."""

    def build(self, run_info: RunInfo) -> Wandb:  # noqa: ARG002
        """The log of one run."""
        return Wandb(self)


class Wandb(Observer):
    """Sends numbers and pictures as they come; each carries the step that it belongs to."""

    def __init__(self, config: WandbConfig) -> None:
        """Nothing is sent before the run starts."""
        self._config = config
        self._log: Any = None
        self._is_whole = False

    def run_started(self, run: RunInfo) -> None:
        """Begin a run there, with the config."""
        import wandb

        own, output = self._config, run.config.output
        folder = own.dir or output.dir
        folder.mkdir(parents=True, exist_ok=True)
        self._log = wandb.init(
            project=own.project, name=own.run_name or output.name, entity=own.entity, group=own.group, tags=own.tags,
            notes=own.notes, dir=folder, config=_tables(run.config), settings=wandb.Settings(console="off"),
        )  # fmt: skip
        # Numbers arrive some steps late, which the service's own counter of steps would not bear.
        self._log.define_metric("*", step_metric="step")

    def metrics_read(self, metrics: StepMetrics) -> None:
        """Send one point of each curve."""
        rates = {f"lr/{name}": rate for name, rate in metrics.learning_rates.items()}
        numbers = {"epoch": metrics.epoch, "loss": metrics.loss, "gradient_norm": metrics.gradient_norm, **rates}
        self._log.log({"step": metrics.step, **numbers})

    def validated(self, step: int, losses: Mapping[str, float]) -> None:
        """Send the losses of images that are not trained on."""
        self._log.log({"step": step, **{f"validation/{name}": loss for name, loss in losses.items()}})

    def previews_drawn(self, step: int, paths: Sequence[Path]) -> None:
        """Send the pictures."""
        import wandb

        self._log.log({"step": step, "previews": [wandb.Image(str(path), caption=path.stem) for path in paths]})

    def run_finished(self) -> None:
        """All steps were done."""
        self._is_whole = True

    def closed(self) -> None:
        """End the run there; one that stopped early counts as failed."""
        if self._log is not None:
            self._log.finish(exit_code=0 if self._is_whole else 1)


def _tables(config: TrainConfig) -> Any:
    """The config as tables; of paths only the last name, as logs may be public."""

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
