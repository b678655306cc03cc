"""What a run came to, as a file that programs read."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from lorakit.api.observer import Observer, RunInfo, StepMetrics
from lorakit.config.dump import to_toml
from lorakit.config.train_config import TrainConfig
from lorakit.utils.atomic_io import write_atomically


class RunReport(Observer):
    """Collects the numbers of a run; its report is a JSON object.

    `config` is a hash of the resolved config, `error` why the run ended early, empty if it did not; `steps` are those
    done, `loss` is the mean training loss of the last epoch's steps, `validation` that of the last validation, and
    `lowest_validation` that of the best, after `lowest_validation_step`. `seconds` are those of the whole run, and
    `memory` is the peak in bytes: of the GPU, or of the process on CPUs. `file` is the last file saved, `previews` are
    the pictures of the last time of drawing.
    """

    def __init__(self, config: TrainConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds since any moment."""
        self._clock, self._started = clock, clock()
        self._recent: deque[float] = deque(maxlen=1)
        self._validations: dict[int, float] = {}
        self._content: dict[str, Any] = {"config": config_hash(config), "steps": 0, "file": None, "previews": []}

    def run_started(self, run: RunInfo) -> None:
        """Remember the length of an epoch."""
        self._recent = deque(maxlen=run.steps_per_epoch)

    def step_finished(self, step: int) -> None:
        """Count it."""
        self._content["steps"] = step

    def metrics_read(self, metrics: StepMetrics) -> None:
        """Remember the loss."""
        self._recent.append(metrics.loss)

    def validated(self, step: int, losses: Mapping[str, float]) -> None:
        """Remember the loss."""
        self._validations[step] = losses["average"]

    def adapter_saved(self, path: Path) -> None:
        """Remember the file."""
        self._content["file"] = str(path.absolute())

    def previews_drawn(self, step: int, paths: Sequence[Path]) -> None:  # noqa: ARG002
        """Remember the pictures."""
        self._content["previews"] = [str(path.absolute()) for path in paths]

    @contextmanager
    def written_to(self, path: Path | None) -> Iterator[None]:
        """Write the report when the block ends, also with an error, which is raised again; nothing without a path."""
        error = ""
        try:
            yield
        except BaseException as raised:
            error = str(raised) or type(raised).__name__
            raise
        finally:
            if path is not None:
                write_atomically(path, json.dumps(self.content(error), indent=1).encode())

    def content(self, error: str = "") -> dict[str, Any]:
        """The report as it is now."""
        lowest = min(self._validations, key=self._validations.__getitem__, default=None)
        return {
            **self._content,
            "error": error,
            "loss": sum(self._recent) / len(self._recent) if self._recent else None,
            "validation": self._validations[max(self._validations)] if self._validations else None,
            "lowest_validation": None if lowest is None else self._validations[lowest],
            "lowest_validation_step": lowest,
            "seconds": self._clock() - self._started,
            "memory": peak_memory(),
        }


def config_hash(config: TrainConfig) -> str:
    """The SHA-256 of a config as it is written beside a run's files."""
    return sha256(to_toml(config).encode()).hexdigest()


def peak_memory() -> int:
    """The most bytes that this process has held: on its GPU if it uses one, else in RAM."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.accelerator.is_available() and hasattr(torch.accelerator, "max_memory_allocated"):
        used = int(torch.accelerator.max_memory_allocated())
        if used:
            return used
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
