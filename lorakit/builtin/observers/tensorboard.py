"""TensorBoard: loss, learning rates and gradient norm of each step, and previews."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from attrs import frozen

from lorakit import hookimpl
from lorakit.components import ObserverConfig
from lorakit.engine.observing import Observer, RunInfo, StepMetrics


@frozen(kw_only=True)
class TensorBoardConfig(ObserverConfig):
    """Logs that `tensorboard --logdir DIR` shows."""

    name = "tensorboard"
    requires = ("tensorboard",)

    dir: Path
    """Folder for logs; each run makes a folder of its own in it."""
    prefix: str = ""
    """Put in front of the run's folder name, which is the output name and the time of the start."""

    def build(self, run_info: RunInfo) -> TensorBoard:
        """The log of one run."""
        started = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        return TensorBoard(self.dir / f"{self.prefix}{run_info.config.output.name}-{started}")


class TensorBoard(Observer):
    """Writes scalars and pictures as they come."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made when the first number arrives."""
        self._folder = folder
        self._writer: Any = None

    def run_started(self, run: RunInfo) -> None:
        """Open the log; the config is its first entry."""
        from torch.utils.tensorboard.writer import SummaryWriter

        from lorakit.config.writing import to_toml

        self._writer = SummaryWriter(str(self._folder))
        self._writer.add_text("config", f"```toml\n{to_toml(run.config)}\n```")

    def metrics_read(self, metrics: StepMetrics) -> None:
        """Write one point of each curve."""
        self._writer.add_scalar("loss", metrics.loss, metrics.step)
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
        """Show the pictures, each under its place in the prompt file, and what they were drawn from."""
        import numpy as np
        from PIL import Image

        for index, path in enumerate(paths):
            with Image.open(path) as image:
                self._writer.add_image(f"previews/{index:02d}", np.asarray(image), step, dataformats="HWC")
                self._writer.add_text(f"previews/{index:02d}", image.info.get("parameters", ""), step)

    def closed(self) -> None:
        """Close the log."""
        if self._writer is not None:
            self._writer.close()


@hookimpl
def register_observers() -> list[type[ObserverConfig]]:
    """TensorBoard."""
    return [TensorBoardConfig]
