"""Faces: what names of files say, and crops around them by the written-out formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorakit.data.images.buckets import ResizeCrop
from lorakit.data.images.face_crop import Face, around_face, face_named
from lorakit.errors import DataError
from lorakit.utils.rng import keyed_generator

FACE = Face((300, 200), 80, (800, 600))


def test_face_in_a_name() -> None:
    """The last four numbers are centre and size; what stands before them may hold underscores."""
    assert face_named(Path("my_cat_300_200_60_80.png"), (800, 600)) == FACE


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cat.png", "must end with _x_y_width_height"),
        ("1_2_3_4.png", "must end with _x_y_width_height"),
        ("cat_1_2_3_x.png", "must end with _x_y_width_height"),
        ("cat_1_-2_3_4.png", "must end with _x_y_width_height"),
        ("cat_800_2_3_4.png", r"around \(800, 2\), in an image of 800x600"),
        ("cat_1_2_0_4.png", "a face of 0x4 pixels"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    """A name that tells of no face, or of an impossible one, is refused by name."""
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        face_named(Path(name), (800, 600))


def test_a_fixed_size_is_exact() -> None:
    """With one number for the size: the face's 80 pixels become 64/2, the scale is 0.4, the face is in the middle."""
    placement = around_face(FACE, (64, 96), (2.0, 2.0), keyed_generator(1), anywhere=False)
    assert placement == ResizeCrop((320, 240), (64, 96), (120 - 32, 80 - 48))


def test_crops_stay_in_the_image() -> None:
    """Near a border the crop ends there, and an image is never made smaller than the bucket."""
    crop_xy = Face((0, 599), 80, (800, 600))
    assert around_face(crop_xy, (64, 96), (2.0, 2.0), keyed_generator(1), anywhere=False).crop_xy == (0, 240 - 96)
    far = around_face(FACE, (64, 96), (50.0, 50.0), keyed_generator(1), anywhere=False)
    assert far.resized == (128, 96)
    small = around_face(Face((10, 10), 5, (40, 30)), (64, 96), (2.0, 2.0), keyed_generator(1), anywhere=False)
    assert small.resized == (128, 96)
    near = around_face(Face((300, 200), 10, (800, 600)), (64, 96), (2.0, 2.0), keyed_generator(1), anywhere=False)
    assert near.resized == (800, 600)


@pytest.mark.parametrize("anywhere", [False, True])
def test_sizes_and_places_vary(anywhere: bool) -> None:
    """Over many draws the crop's shorter side is 2 to 4 faces long; its middle moves little, or over the image."""
    face = Face((400, 300), 80, (800, 600))
    sizes, offsets = [], []
    for number in range(400):
        placement = around_face(face, (64, 96), (2.0, 4.0), keyed_generator("crop", number), anywhere=anywhere)
        scale = placement.resized[0] / 800
        sizes.append(64 / (80 * scale))
        middle = np.add(placement.crop_xy, (32, 48))
        offsets.append((middle - np.multiply(face.center, scale)) / (80 * scale))
        assert (np.array(placement.crop_xy) >= 0).all()
        assert (np.array(placement.crop_xy) + placement.bucket <= placement.resized).all()
    assert 1.95 < min(sizes) < 2.1
    assert 3.7 < max(sizes) < 4.05
    reach = np.abs(offsets).max(axis=0)
    assert (reach > 0.5).all() if anywhere else (reach < 0.15).all()
