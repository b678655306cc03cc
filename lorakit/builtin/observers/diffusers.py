"""Copies of saved adapters in other layouts, such as that of diffusers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import ObserverConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.lora_layout import LoRALayout
from lorakit.api.observer import Observer, RunInfo
from lorakit.errors import AdapterError, Problem
from lorakit.utils.wording import listed

if TYPE_CHECKING:
    from lorakit.config.train_config import TrainConfig

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class DiffusersConfig(ObserverConfig):
    """Writes copies of each LoRA file in other layouts, `NAME.diffusers.safetensors` by default.

    diffusers loads DoRA only from the copy.
    """

    name = "diffusers"

    layouts: tuple[LoRALayout, ...] = field(default=("diffusers",), validator=v.min_len(1))
    """Layouts of the copies: `diffusers` (paths in a pipeline, as PEFT has it), `kohya` (that of sd-scripts), and
    `original` (`diffusion_model.` and the path in the original code). They are in the names of the copies:
    `NAME.kohya.safetensors`."""

    def problems_with(self, config: TrainConfig) -> Iterator[Problem]:
        """Layouts that the model's layers have no names in."""
        model = config.model
        for layout in self.layouts:
            if layout not in model.lora_layouts:
                found = f"has {layout!r}, in which the layers of {model.name} have no names"
                yield Problem("layouts", found, f"{model.name} has {listed(model.lora_layouts)}")

    def warnings_with(self, config: TrainConfig) -> Iterator[Problem]:
        """The layout of the files themselves."""
        if config.model.lora_layout in self.layouts:
            found = f"{config.model.lora_layout!r} has no effect, as the files themselves are in this layout"
            yield Problem("layouts", found)

    def build(self, run_info: RunInfo) -> Copies:
        """The copies of one run."""
        return Copies(run_info, self.layouts)


class Copies(Observer):
    """Copies each file that is saved, and removes copies of files that are not kept."""

    def __init__(self, run: RunInfo, layouts: tuple[LoRALayout, ...]) -> None:
        self._run = run
        self._layouts = [layout for layout in layouts if layout != run.config.model.lora_layout]
        self._copies: dict[Path, list[Path]] = {}

    def adapter_saved(self, path: Path) -> None:
        """Write the copies of a file; a warning if it is of a network that a layout has no place for."""
        from lorakit.networks.adapter_file import AdapterFile, SafetensorsSaver, load_initial_weights, read_adapter
        from lorakit.networks.lora_layouts import copy_in_layout

        metadata, targets = read_adapter(path).metadata, self._run.targets
        tensors, saver = load_initial_weights(path, targets), SafetensorsSaver(self._run.config.saver.precision)
        for layout in self._layouts:
            copy = path.with_name(f"{path.stem}.{layout}.safetensors")
            try:
                copied = copy_in_layout(tensors, layout, targets)
            except AdapterError as error:
                log.warning("there is no copy of %s for %s: %s", path.name, layout, error)
                continue
            saver.save(AdapterFile(copied, metadata), copy)
            self._copies.setdefault(path, []).append(copy)
        self._remove_strays()

    def closed(self) -> None:
        """Remove the last copies of files that were not kept."""
        self._remove_strays()

    def _remove_strays(self) -> None:
        for path in [path for path in self._copies if not path.exists()]:
            for copy in self._copies.pop(path):
                copy.unlink(missing_ok=True)


@hookimpl
def register_observers() -> list[type[ObserverConfig]]:
    """Copies in other layouts."""
    return [DiffusersConfig]
