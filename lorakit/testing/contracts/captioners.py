"""What every captioner must do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorakit.api.captioner import Captioner, CaptionerConfig
from lorakit.captioning.folder import CaptionOptions, write_captions
from lorakit.plugins.build import build_component
from lorakit.testing.contracts.component import ComponentContract

SIZES = ((24, 24), (64, 16), (9, 40), (1, 1))
"""Sizes of the images to caption: a square, a wide and a tall one, and a single pixel."""


class CaptionerContract(ComponentContract):
    """What every captioner must do.

        class TestTagger(CaptionerContract):
            config = TaggerConfig(model="tagger")

    A model that the config names must be there: a fixture of the test can make a tiny one, and set `self.config`.
    """

    config: CaptionerConfig
    test_reads_back_from_a_config_file: Any = None  # no config has it

    @pytest.fixture
    def captioner(self) -> Captioner:
        """The captioner, on the CPU."""
        built: Captioner = build_component(self.config, "cpu")
        return built

    @pytest.fixture
    def images(self) -> list[Image.Image]:
        """Images of several sizes."""
        generator = np.random.default_rng(0)
        return [
            Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES
        ]

    def test_the_config_is_right(self) -> None:
        """There is nothing wrong with the options that are tested."""
        assert list(self.config.problems()) == []

    def test_captions_each_image(self, captioner: Captioner, images: list[Image.Image]) -> None:
        """One text for each image, however many there are and of whatever size."""
        for count in (len(images), 1):
            captions = captioner.caption(images[:count])
            assert isinstance(captions, list)
            assert len(captions) == count
            assert all(isinstance(caption, str) for caption in captions)

    def test_captions_are_the_same_again(self, captioner: Captioner, images: list[Image.Image]) -> None:
        """An image has the same caption each time, alone or beside others."""
        together = captioner.caption(images)
        assert captioner.caption(images) == together
        assert [captioner.caption([image])[0] for image in images] == together

    def test_does_not_change_images(self, captioner: Captioner, images: list[Image.Image]) -> None:
        """The images are as they were."""
        before = [(image.size, image.tobytes()) for image in images]
        captioner.caption(images)
        assert [(image.size, image.tobytes()) for image in images] == before

    def test_captions_a_folder(self, captioner: Captioner, photographs: Path, tmp_path: Path) -> None:
        """`lorakit caption` writes a file for each image of a folder, in one line."""
        folder = tmp_path / "to caption"
        folder.mkdir()
        for path in photographs.glob("*.png"):
            shutil.copy(path, folder)
        result = write_captions(folder, (self.config, captioner), CaptionOptions(batch_size=3))
        files = sorted(folder.glob("*.txt"))
        assert [change.path for change in result.changes] == files
        assert len(files) == 4
        assert all(path.read_text(encoding="utf-8").count("\n") == 1 for path in files)
