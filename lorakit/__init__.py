"""lorakit: a plugin-based trainer of LoRA adapters for Stable Diffusion.

Importing this package imports neither torch nor any plugin.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lorakit._version import __version__
from lorakit.api.hookspecs import hookimpl

# MKL reads this at its first call. Without it, products with one column differ from run to run in the last bits.
os.environ.setdefault("MKL_CBWR", "AUTO")
# libgomp reads this when PyTorch loads it: how often a thread that waits for others looks before it sleeps. With
# libgomp's 300 000, threads hold cores that those others need, and beside busy programs a run hardly moves.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# PyTorch's allocator reads this before it first uses a GPU: memory freed by images of one size then serves those of
# another, as its segments grow instead of staying as they were. Only Linux has it.
if sys.platform == "linux" and not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & set(os.environ):
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

if TYPE_CHECKING:
    from lorakit.api.observer import Observer
    from lorakit.config.train_config import TrainConfig
    from lorakit.dataset_report.report import DataReport
    from lorakit.planning.plan import Plan
    from lorakit.plugins.catalog import Catalog
    from lorakit.training.prepare import CheckedRun

    Config: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | TrainConfig

log = logging.getLogger(__name__)

__all__ = ["__version__", "check", "hookimpl", "plan", "report_data", "train"]


def train(
    config: Config,
    *,
    overrides: Sequence[str] = (),
    resume: str | Path | None = None,
    observers: Sequence[Observer] = (),
    stop: threading.Event | None = None,
) -> Path:
    """Train as a config says; gives the path of the final LoRA file.

    `config` is a config file, the tables that it would hold, whose relative paths start at the current folder, or a
    config value. `overrides` are `"section.key=value"` texts, for a file only; `resume` is the folder of a state, or
    `"latest"`. `observers` are notified as those that the config names are. Once `stop` is set, by an observer or by
    any thread, the run ends after the step with a saved state and raises Interrupted.
    Raises the errors of `lorakit.errors`.
    """
    from lorakit.api.observer import Observer
    from lorakit.plugins.catalog import Catalog
    from lorakit.training.prepare import prepare

    for observer in observers:
        if not isinstance(observer, Observer):
            raise TypeError(f"observers must be instances of lorakit.api.Observer, not of {type(observer).__name__}")
    catalog = Catalog.discover()
    checked = _config(config, overrides, catalog)
    prepared = prepare(checked, resuming=resume is not None)
    # Launchers number the processes of a run.
    for warning in (*checked.warnings(), *prepared.warnings) if os.environ.get("RANK", "0") == "0" else ():
        log.warning("%s", warning)
    from lorakit.training.setup import run_training

    state: Path | Literal["latest"] | None = Path(resume) if resume else None
    if resume == "latest":
        state = "latest"
    return run_training(prepared, catalog, state, observers, stop)


def check(config: Config, *, overrides: Sequence[str] = ()) -> CheckedRun:
    """Look at a config and its files, reading no weights; gives the length of the run, and warnings.

    `config` and `overrides` are those of `train`. Imports no torch. Raises the errors of `lorakit.errors`; of these a
    ConfigError has every problem.
    """
    from lorakit.plugins.catalog import Catalog
    from lorakit.training.prepare import check_run

    return check_run(_config(config, overrides, Catalog.discover()))


def plan(config: Config, *, overrides: Sequence[str] = (), measure: bool = False) -> Plan:
    """Say what a run will take: steps, memory and, if it is to be measured, time.

    `config` and `overrides` are those of `train`. Raises the errors of `lorakit.errors`.
    """
    from lorakit.planning.plan import make_plan
    from lorakit.plugins.catalog import Catalog
    from lorakit.training.prepare import prepare

    return make_plan(prepare(_config(config, overrides, Catalog.discover())), measured=measure)


def report_data(config: Config, *, overrides: Sequence[str] = ()) -> DataReport:
    """Report on the images and captions of a config, as `lorakit data` does.

    `config` and `overrides` are those of `train`. Imports no torch. Raises the errors of `lorakit.errors`.
    """
    from lorakit.dataset_report.report import report_data as report
    from lorakit.plugins.catalog import Catalog

    return report(_config(config, overrides, Catalog.discover()))


def _config(config: Config, overrides: Sequence[str], catalog: Catalog) -> TrainConfig:
    """The config that is meant. Raises ConfigError with every problem found."""
    from lorakit.config.load import config_from_tables, read_config
    from lorakit.utils.plain import plain

    if isinstance(config, str | os.PathLike):
        return read_config(Path(config), overrides, catalog)
    if overrides:
        raise TypeError("overrides are for config files; change the tables, or the config value, instead")
    return config_from_tables(plain(config), Path.cwd(), catalog) if isinstance(config, Mapping) else config
