"""Real distributions for tests of plugins: a module and its metadata, as an installer leaves them."""

from __future__ import annotations

from pathlib import Path

OPTIMIZER = '''
from attrs import frozen
from lorakit.api import OptimizerConfig, hookimpl


@frozen(kw_only=True)
class GuestConfig(OptimizerConfig):
    """An optimizer of a guest."""

    name = "{name}"
    requires = {requires!r}

    strength: float = 0.5
    """How strong it is."""

    def build(self, groups):
        """Nothing."""


@hookimpl
def register_optimizers():
    return [GuestConfig]
'''
"""A plugin with one optimizer; to be formatted with its name and the packages that it requires."""


def optimizer_source(name: str, requires: tuple[str, ...] = ()) -> str:
    """The module of a plugin with one optimizer."""
    return OPTIMIZER.format(name=name, requires=requires)


def install(folder: Path, distribution: str, **modules: str) -> Path:
    """Put a distribution into a folder, with one entry point for each of its modules; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
    entry_points = "".join(f"{module} = {module}\n" for module in modules)
    write_metadata(folder, distribution, f"[lorakit]\n{entry_points}")
    return folder


def write_metadata(folder: Path, distribution: str, entry_points: str) -> None:
    """The `.dist-info` folder of a distribution, version 1.0."""
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")
