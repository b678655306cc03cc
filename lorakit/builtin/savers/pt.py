"""The saver `pt`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.api.components import SaverConfig
from lorakit.api.hookspecs import hookimpl

if TYPE_CHECKING:
    from lorakit.networks.adapter_file import Saver


@frozen(kw_only=True)
class PtConfig(SaverConfig):
    """A pickled dict of tensors, for old tools; holds no metadata."""

    name = "pt"

    def build(self) -> Saver:
        """Writes and reads `.pt` files."""
        from lorakit.networks.adapter_file import TorchSaver

        return TorchSaver(self.precision, ".pt")


@hookimpl
def register_savers() -> list[type[SaverConfig]]:
    """Pickled files that end in .pt."""
    return [PtConfig]
