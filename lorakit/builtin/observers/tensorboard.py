"""TensorBoard: loss, learning rates and gradient norm of each step, and previews."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from attrs import frozen

from lorakit.api.components import ObserverConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.observer import Observer, RunInfo, StepMetrics


@frozen(kw_only=True)
class TensorBoardConfig(ObserverConfig):
    """TensorBoard logs; view them with `tensorboard --logdir DIR`."""

    name = "tensorboard"
    requires = ("tensorboard",)

    dir: Path
    """Folder for logs; each run creates a subfolder."""
    prefix: str = ""
    """Prefix of the run's folder name, which is the output name and the start time."""

    def build(self, run_info: RunInfo) -> TensorBoard:
        """The log of one run."""
        started = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        return TensorBoard(self.dir / f"{self.prefix}{run_info.config.output.name}-{started}")


class TensorBoard(Observer):
    """Writes scalars and images as they come."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made when the first number arrives."""
        self._folder = folder
        self._writer: Any = None
        self._run: Any = None
        self._pace: Any = None

    def run_started(self, run: RunInfo) -> None:
        """Open the log; the config is its first entry."""
        from torch.utils.tensorboard.writer import SummaryWriter

        from lorakit.config.dump import to_toml
        from lorakit.training.progress import Pace

        self._writer = SummaryWriter(str(self._folder))
        self._writer.add_text("config", f"```toml\n{to_toml(run.config)}\n```")
        losses = ["Multiline", ["^loss$", "^loss/validation/average$"]]
        self._writer.add_custom_scalars({"loss": {"training and validation": losses}})
        self._run, self._pace = run, Pace()

    def step_finished(self, step: int) -> None:
        """Write how fast steps are, previews and saves not counted."""
        self._pace.add(step, self._run.training_seconds())
        if self._pace.rate:
            self._writer.add_scalar("steps_per_second", self._pace.rate, step)

    def metrics_read(self, metrics: StepMetrics) -> None:
        """Write one point of each curve."""
        self._writer.add_scalar("loss", metrics.loss, metrics.step)
        self._writer.add_scalar("epoch", metrics.epoch, metrics.step)
        self._writer.add_scalar("gradient_norm", metrics.gradient_norm, metrics.step)
        for name, rate in metrics.learning_rates.items():
            self._writer.add_scalar(f"lr/{name}", rate, metrics.step)
        for name, value in metrics.values.items():
            self._writer.add_scalar(name, value, metrics.step)

    def validated(self, step: int, losses: Mapping[str, float]) -> None:
        """Write one point of each curve."""
        for name, loss in losses.items():
            self._writer.add_scalar(f"loss/validation/{name}", loss, step)

    def previews_drawn(self, step: int, paths: Sequence[Path]) -> None:
        """Show the images, each under its place in the prompt file, with its prompt and what it was drawn from."""
        import numpy as np
        from PIL import Image
        from torch.utils.tensorboard import summary

        image_summary: Any = summary.image
        for index, path in enumerate(paths):
            tag = f"previews/{index:02d}"
            with Image.open(path) as image:
                shown = image_summary(tag, np.asarray(image), dataformats="HWC")
                prompt, parameters = image.info.get("prompt", ""), image.info.get("parameters", "")
            shown.value[0].metadata.display_name = f"{index:02d} {prompt}"
            shown.value[0].metadata.summary_description = parameters
            self._writer.file_writer.add_summary(shown, step)
            self._writer.add_text(tag, parameters, step)

    def closed(self) -> None:
        """Close the log."""
        if self._writer is not None:
            self._writer.close()


@hookimpl
def register_observers() -> list[type[ObserverConfig]]:
    """TensorBoard."""
    return [TensorBoardConfig]
