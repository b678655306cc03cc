"""Captioners: what writes captions of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from attrs import frozen

from lorakit.api.components import Component

if TYPE_CHECKING:
    from PIL.Image import Image


class Captioner(Protocol):
    """A model that describes images, in sentences or in tags."""

    def caption(self, images: Sequence[Image]) -> list[str]:
        """The caption of each image, in their order.

        Images are in RGB, upright, of any size, and what was transparent is white; they are not to be changed. Spaces
        and line breaks in a caption become single spaces.
        """


@frozen(kw_only=True)
class CaptionerConfig(Component):
    """What `lorakit caption --with NAME` writes captions with; its fields are what `--option` sets."""

    kind = "captioner"
    product = "a Captioner, with caption"
    product_methods = ("caption",)

    def build(self, device: str) -> Captioner:
        """The captioner, with its model loaded.

        `device` is `auto`, for whatever is there, or what PyTorch calls one: `cpu`, `cuda`, `cuda:1`, `mps`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method build")
