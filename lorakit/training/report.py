"""What a run came to, as a file that programs read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from lorakit.config.dump import to_toml
from lorakit.config.train_config import TrainConfig
from lorakit.errors import OutputError
from lorakit.training.summary import RunAccount
from lorakit.utils.atomic_io import unwritable_reason, write_atomically


def check_report_path(path: Path) -> None:
    """Raise OutputError where no report could be written once the run has ended."""
    reason = "it is a folder" if path.is_dir() else unwritable_reason(path.parent)
    if reason:
        raise OutputError(f"the report {path} cannot be written: {reason}; give another path")


class RunReport:
    """The numbers of a run as a JSON object.

    `config` is a hash of the resolved config, `error` why the run ended early, empty if it did not; `steps` are those
    done, `loss` is the mean training loss of the last epoch's steps, `validation` that of the last validation, and
    `lowest_validation` that of the best, after `lowest_validation_step`. `seconds` are those of the whole run, and
    `memory` is the peak in bytes: of the GPU, or of the process on CPUs. `file` is the final file, or the last one
    saved before an early end; `previews` are the pictures of the last time of drawing.
    """

    def __init__(self, config: TrainConfig, account: RunAccount) -> None:
        """`account` observes the run."""
        self._config, self._account = config, account

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
        account, lowest = self._account, self._account.lowest_step
        losses = account.validations
        return {
            "config": config_hash(self._config),
            "steps": account.step,
            "file": account.file and str(account.file.absolute()),
            "previews": [str(path.absolute()) for path in account.previews],
            "error": error,
            "loss": account.loss,
            "validation": losses[max(losses)] if losses else None,
            "lowest_validation": None if lowest is None else losses[lowest],
            "lowest_validation_step": lowest,
            "seconds": account.seconds,
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
