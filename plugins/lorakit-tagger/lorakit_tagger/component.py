"""The captioner `tagger`: its options."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit.api import Captioner, CaptionerConfig, ModelError, Problem, hookimpl, locate

if TYPE_CHECKING:
    from lorakit.api import HubModel

MODEL_FILE, TAGS_FILE = "model.onnx", "selected_tags.csv"


@frozen(kw_only=True)
class TaggerConfig(CaptionerConfig):
    """Tags, by an ONNX model of the WD14 kind: SmilingWolf's wd-*-tagger-v2 and v3, and others with the same files."""

    name = "tagger"
    requires = ("onnxruntime",)

    model: str
    """Folder with `model.onnx` and `selected_tags.csv`, or a Hub id such as `SmilingWolf/wd-vit-tagger-v3`."""
    threshold: float = field(default=0.35, validator=[v.ge(0), v.le(1)])
    """Probability from which on a general tag is written."""
    character_threshold: float = field(default=0.85, validator=[v.ge(0), v.le(1)])
    """Probability from which on the name of a character is written."""
    exclude: tuple[str, ...] = ()
    """Tags that are never written, with spaces or underscores."""
    keep_underscores: bool = False
    """Write `long_hair` instead of `long hair`."""

    def problems(self) -> Iterator[Problem]:
        """A model that is nowhere, or lacks a file."""
        try:
            location = self.location()
        except ModelError:
            hint = f"give a folder with {MODEL_FILE} and {TAGS_FILE}, or a Hub id such as SmilingWolf/wd-vit-tagger-v3"
            yield Problem("model", f"{Path(self.model).absolute()} does not exist", hint)
            return
        if isinstance(location, Path):
            missing = [name for name in (MODEL_FILE, TAGS_FILE) if not (location / name).is_file()]
            if missing:
                hint = f"give a folder with {MODEL_FILE} and {TAGS_FILE}"
                yield Problem("model", f"{location} has no {' and no '.join(missing)}", hint)

    def location(self) -> Path | HubModel:
        """The folder, or the model on the Hub. Raises ModelError."""
        return locate(self.model, Path())

    def build(self, device: str) -> Captioner:
        """The tagger, with its model read."""
        from lorakit_tagger.tagger import Tagger

        return Tagger(self, device)


@hookimpl
def register_captioners() -> list[type[CaptionerConfig]]:
    """The tagger."""
    return [TaggerConfig]
