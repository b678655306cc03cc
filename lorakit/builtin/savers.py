"""The built-in file formats of adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.api import SaverConfig, hookimpl

if TYPE_CHECKING:
    from lorakit.api import Saver


@frozen(kw_only=True)
class SafetensorsConfig(SaverConfig):
    """Safetensors, with metadata; the format that all tools read."""

    name = "safetensors"

    def build(self) -> Saver:
        """Writes and reads `.safetensors` files."""
        from lorakit.networks.adapter_file import SafetensorsSaver

        return SafetensorsSaver(self.precision)


@frozen(kw_only=True)
class CkptConfig(SaverConfig):
    """A pickled dict of tensors, for old tools; without metadata."""

    name = "ckpt"

    def build(self) -> Saver:
        """Writes and reads `.ckpt` files."""
        from lorakit.networks.adapter_file import TorchSaver

        return TorchSaver(self.precision, ".ckpt")


@frozen(kw_only=True)
class PtConfig(SaverConfig):
    """A pickled dict of tensors, for old tools; without metadata."""

    name = "pt"

    def build(self) -> Saver:
        """Writes and reads `.pt` files."""
        from lorakit.networks.adapter_file import TorchSaver

        return TorchSaver(self.precision, ".pt")


@hookimpl
def register_savers() -> list[type[SaverConfig]]:
    """Safetensors, and pickled files with two suffixes."""
    return [SafetensorsConfig, CkptConfig, PtConfig]
