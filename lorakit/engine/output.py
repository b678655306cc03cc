"""The files of a run: the adapters with their metadata, and the resolved config beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from lorakit.blame import blaming
from lorakit.config.sections import TrainConfig
from lorakit.config.writing import to_toml
from lorakit.engine.metadata import save_metadata, without_training
from lorakit.errors import OutputError, TrainingDiverged
from lorakit.files import write_atomically
from lorakit.models.protocol import DiffusionModel
from lorakit.networks.network import Network
from lorakit.networks.saving import AdapterFile, Saver
from lorakit.plugins import Catalog


@frozen
class AdapterWriter:
    """Writes the adapters of one run."""

    config: TrainConfig
    model: DiffusionModel
    network: Network
    saver: Saver
    metadata: Mapping[str, str]
    """What stays the same over the run, but for what the model says of itself."""

    def write_config(self, catalog: Catalog) -> None:
        """Write the resolved config, which repeats the run; the catalog says which names need a distribution."""
        path = self.config.output.dir / f"{self.config.output.name}.config.toml"
        write_atomically(path, to_toml(self.config, catalog).encode())

    def path(self, stem: str) -> Path:
        """The file for a name without extension."""
        return self.config.output.dir / f"{stem}{self.saver.suffix}"

    def write(self, stem: str, step: int, epoch: int) -> Path:
        """Write the adapters as they are now.

        Raises TrainingDiverged when a factor is not finite, so that a broken file never takes the
        place of a good one.
        """
        tensors = self.network.file_tensors()
        broken = next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None)
        if broken:
            raise TrainingDiverged(f"step {step}: {broken} is not finite; nothing was saved, earlier saves are kept")
        path = self.path(stem)
        # Asked for here and not at the start: hashing a base model of some gigabytes takes seconds, once.
        metadata = {**self.metadata, **self.model.metadata(), **save_metadata(step, epoch)}
        if self.config.metadata.minimal:
            metadata = without_training(metadata)
        with blaming(self.config.saver, "save"):
            try:
                self.saver.save(AdapterFile(tensors, metadata), path)
            except OSError as error:
                raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
        return path
