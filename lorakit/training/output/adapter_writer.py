"""The files of a run: the adapters with their metadata, and the resolved config beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from attrs import frozen

from lorakit.config.dump import to_toml
from lorakit.config.train_config import TrainConfig
from lorakit.errors import AdapterError, OutputError, TrainingDiverged
from lorakit.models.interfaces import DiffusionModel, Memo
from lorakit.networks.adapter_file import AdapterFile, Saver
from lorakit.networks.lora_layouts import in_layout
from lorakit.networks.network import Network
from lorakit.plugins.catalog import Catalog
from lorakit.plugins.failures import plugin_errors
from lorakit.training.output.metadata import save_metadata, without_training
from lorakit.utils.atomic_io import as_output_error, commit, staging_dir, write_atomically


@frozen
class AdapterWriter:
    """Writes the adapters of one run."""

    config: TrainConfig
    model: DiffusionModel
    network: Network
    saver: Saver
    metadata: Mapping[str, str]
    """What stays the same over the run, except for the model's part."""
    memo: Memo
    """Caches the hashes of the base model's files."""

    def write_config(self, catalog: Catalog) -> None:
        """Write the resolved config, which repeats the run; the catalog says which names need a distribution."""
        path = self.config.output.dir / f"{self.config.output.name}.config.toml"
        write_atomically(path, to_toml(self.config, catalog).encode())

    def path(self, stem: str, folder: Path | None = None) -> Path:
        """The file for a name without extension, in the output folder or another."""
        return (folder or self.config.output.dir) / f"{stem}{self.saver.suffix}"

    @property
    def size(self) -> int:
        """About how many bytes a file has."""
        itemsize = 4 if self.config.saver.precision == "fp32" else 2
        return sum(tensor.numel() for tensor in self.network.export_state().values()) * itemsize

    def write(self, path: Path, step: int, epoch: int, more: Mapping[str, str]) -> None:
        """Write the adapters as they are now, and read them back before the file gets its name.

        `more` is added to the metadata.
        Raises TrainingDiverged when a weight is not finite, so that a broken file never takes the place of a
        good one; and OutputError when the file cannot be written, or is not read back as it was written.
        """
        tensors = in_layout(self.network.export_state(), self.config.model.lora_layout, self.network.targets)
        broken = next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None)
        if broken:
            raise TrainingDiverged(f"step {step}: {broken} is not finite; nothing was saved, earlier saves remain")
        # Asked for here and not at the start: hashing a base model of some gigabytes takes seconds, once.
        metadata = {**self.metadata, **self.model.metadata(self.memo), **save_metadata(step, epoch), **more}
        if self.config.metadata.minimal:
            metadata = without_training(metadata)
        with staging_dir(path) as scratch:
            written = scratch / path.name
            with plugin_errors(self.config.saver, "save"), as_output_error(path):
                try:
                    self.saver.save(AdapterFile(tensors, metadata), written)
                except OutputError as error:
                    raise OutputError(str(error).replace(str(written), str(path))) from error
            try:
                with plugin_errors(self.config.saver, "load"):
                    read = self.saver.load(written).tensors
            except AdapterError as error:
                reason = str(error)
            else:
                wrong = tensors.keys() ^ read.keys()
                wrong |= {
                    key for key in tensors.keys() - wrong if not torch.equal(tensors[key].to(read[key]), read[key])
                }
                reason = f"{min(wrong)} differs" if wrong else ""
            if reason:
                raise OutputError(f"{path} was not read back as it was written: {reason}. The disk may be failing.")
            commit(written, path)
