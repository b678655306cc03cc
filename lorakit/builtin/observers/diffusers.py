"""Copies of saved adapters in the layout of diffusers."""

from __future__ import annotations

import logging
from pathlib import Path

from attrs import frozen

from lorakit.api.components import ObserverConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.observer import Observer, RunInfo
from lorakit.errors import AdapterError

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class DiffusersConfig(ObserverConfig):
    """Writes `NAME.diffusers.safetensors` beside each LoRA file, the only layout from which diffusers loads DoRA."""

    name = "diffusers"

    def build(self, run_info: RunInfo) -> DiffusersCopies:
        """The copies of one run."""
        return DiffusersCopies(run_info)


class DiffusersCopies(Observer):
    """Copies each file that is saved, and removes copies of files that are not kept."""

    def __init__(self, run: RunInfo) -> None:
        self._run = run
        self._copies: dict[Path, Path] = {}

    def adapter_saved(self, path: Path) -> None:
        """Write the copy of a file; a warning if it is of a network that the layout has no place for."""
        from lorakit.networks.adapter_file import AdapterFile, SafetensorsSaver, load_initial_weights, read_adapter
        from lorakit.networks.lora_layouts import in_layout

        metadata, targets = read_adapter(path).metadata, self._run.targets
        copy = path.with_name(f"{path.stem}.diffusers.safetensors")
        try:
            tensors = in_layout(load_initial_weights(path, targets), "diffusers", targets)
        except AdapterError as error:
            log.warning("there is no copy of %s for diffusers: %s", path.name, error)
            return
        SafetensorsSaver(self._run.config.saver.precision).save(AdapterFile(tensors, metadata), copy)
        self._copies[path] = copy
        self._remove_strays()

    def closed(self) -> None:
        """Remove the last copies of files that were not kept."""
        self._remove_strays()

    def _remove_strays(self) -> None:
        for path in [path for path in self._copies if not path.exists()]:
            self._copies.pop(path).unlink(missing_ok=True)


@hookimpl
def register_observers() -> list[type[ObserverConfig]]:
    """Copies for diffusers."""
    return [DiffusersConfig]
