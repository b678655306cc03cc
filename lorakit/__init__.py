"""lorakit: a plugin-based trainer of LoRA adapters for Stable Diffusion.

Importing this package imports neither torch nor any plugin.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

# MKL reads this at its first call. Without it, products with one column differ from run to run in the last bits.
os.environ.setdefault("MKL_CBWR", "AUTO")

if TYPE_CHECKING:
    from lorakit.config.sections import TrainConfig

__version__ = "0.1.0"

log = logging.getLogger(__name__)

hookimpl = pluggy.HookimplMarker("lorakit")
"""Marks a function of a plugin as the implementation of one of the hooks in `lorakit.hookspecs`."""


def train(config: str | Path | TrainConfig, *, overrides: Sequence[str] = (), resume: str | Path | None = None) -> Path:
    """Train as a config file or a config value says; gives the path of the final LoRA file.

    `overrides` are `"section.key=value"` texts, for a file only. `resume` is the folder of a state.
    Raises the errors of `lorakit.errors`.
    """
    from lorakit.config.reading import read_config
    from lorakit.engine.preparation import prepare
    from lorakit.plugins import Catalog

    catalog = Catalog.discover()
    checked = read_config(Path(config), overrides, catalog) if isinstance(config, str | Path) else config
    prepared = prepare(checked, resuming=resume is not None)
    for warning in prepared.warnings:
        log.warning("%s", warning)
    from lorakit.engine.assembly import train_prepared

    return train_prepared(prepared, catalog, Path(resume) if resume is not None else None)
