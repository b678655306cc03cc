"""The saver `safetensors`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.api.components import SaverConfig
from lorakit.api.hookspecs import hookimpl

if TYPE_CHECKING:
    from lorakit.networks.adapter_file import Saver


@frozen(kw_only=True)
class SafetensorsConfig(SaverConfig):
    """Safetensors: the format that all tools read, with metadata."""

    name = "safetensors"

    def build(self) -> Saver:
        """Writes and reads `.safetensors` files."""
        from lorakit.networks.adapter_file import SafetensorsSaver

        return SafetensorsSaver(self.precision)


@hookimpl
def register_savers() -> list[type[SaverConfig]]:
    """Files in the safetensors format."""
    return [SafetensorsConfig]
