"""Bucket sizes and placements, against the numbers that sd-scripts computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.config.datasets import DatasetConfig, SubsetConfig
from lorakit.data.images.buckets import ResizeCrop, assign_bucket, bucket_resolutions
from lorakit.errors import DataError


def make_dataset(resolution: tuple[int, int] = (512, 512), **settings: object) -> DatasetConfig:
    """A dataset with buckets."""
    settings = {"enable_bucket": True, **settings}
    return DatasetConfig(subsets=(SubsetConfig(image_dir=Path()),), resolution=resolution, **settings)


def test_buckets_of_512_are_the_known_seventeen():
    """All bucket sizes of sd-scripts for its usual settings, in its order."""
    tall = [(256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576)]
    expected = sorted([*tall, (512, 512), *((height, width) for width, height in tall)])
    assert bucket_resolutions((512, 512), 256, 1024, 64) == tuple(expected)


@pytest.mark.parametrize(
    ("side", "minimum", "maximum", "step", "count"),
    [(768, 256, 1024, 64, 19), (768, 256, 1536, 64, 29), (1024, 256, 2048, 64, 41), (1024, 512, 2048, 32, 65)],
)
def test_number_of_buckets(side: int, minimum: int, maximum: int, step: int, count: int):
    """As many buckets as sd-scripts makes for other resolutions and steps."""
    assert len(bucket_resolutions((side, side), minimum, maximum, step)) == count


def test_limits_are_rounded_to_steps():
    """The shortest side is rounded down and the longest up, as by a dataset that says so exactly."""
    assert bucket_resolutions((512, 512), 300, 1000, 64) == bucket_resolutions((512, 512), 256, 1024, 64)


@pytest.mark.parametrize(
    ("size", "resized", "bucket"),
    [
        ((1920, 1080), (683, 384), (640, 384)),
        ((1000, 1500), (427, 640), (384, 640)),
        ((640, 480), (597, 448), (576, 448)),
        ((300, 400), (448, 597), (448, 576)),
        ((513, 511), (514, 512), (512, 512)),
        ((3000, 800), (960, 256), (960, 256)),
        ((640, 384), (640, 384), (640, 384)),
    ],
)
def test_placement_in_the_closest_bucket(size: tuple[int, int], resized: tuple[int, int], bucket: tuple[int, int]):
    """An image goes to the bucket of the closest aspect ratio and covers it."""
    assert assign_bucket(size, make_dataset()) == ResizeCrop(resized, bucket)


@pytest.mark.parametrize(
    ("size", "resized", "bucket"),
    [
        ((1000, 1500), (384, 576), (384, 576)),
        ((640, 480), (512, 384), (512, 384)),
        ((300, 400), (300, 400), (256, 384)),
        ((513, 511), (513, 511), (512, 448)),
    ],
)
def test_placement_without_enlarging(size: tuple[int, int], resized: tuple[int, int], bucket: tuple[int, int]):
    """Without enlarging, an image's bucket is its own size, or that of its area, rounded down."""
    assert assign_bucket(size, make_dataset(bucket_no_upscale=True)) == ResizeCrop(resized, bucket)


def test_placement_without_buckets():
    """Without buckets every image covers the one resolution, even if bucket_no_upscale is set."""
    dataset = make_dataset((512, 384), enable_bucket=False, bucket_no_upscale=True)
    assert assign_bucket((100, 100), dataset) == ResizeCrop((512, 512), (512, 384))
    assert assign_bucket((2000, 500), dataset) == ResizeCrop((1536, 384), (512, 384))


@pytest.mark.parametrize("size", [(63, 400), (400, 63), (20_000, 100), (1, 1)])
def test_image_too_small_for_its_steps(size: tuple[int, int]):
    """A side below the step is an error with a cure, not a division by zero."""
    with pytest.raises(DataError, match=r"leave no bucket with sides of at least 64 pixels \(.*bucket_no_upscale"):
        assign_bucket(size, make_dataset(bucket_no_upscale=True))


def test_step_larger_than_the_resolution():
    """Steps that leave no bucket at all are an error that names the key."""
    with pytest.raises(DataError, match="bucket_reso_steps 256 leave no bucket"):
        assign_bucket((100, 100), make_dataset((128, 128), bucket_reso_steps=256))


@given(st.integers(64, 5000), st.integers(64, 5000), st.booleans(), st.sampled_from([32, 64]))
def test_resized_image_covers_its_bucket(width: int, height: int, no_upscale: bool, step: int):
    """The resized image is at least as large as its bucket, whose sides are multiples of the step."""
    dataset = make_dataset(bucket_no_upscale=no_upscale, bucket_reso_steps=step)
    try:
        placement = assign_bucket((width, height), dataset)
    except DataError:
        assert max(width, height) / min(width, height) > 512 * 512 / (2 * step) ** 2
        return
    assert all(whole >= part > 0 for whole, part in zip(placement.resized, placement.bucket, strict=True))
    assert all(side % step == 0 for side in placement.bucket)


@pytest.mark.parametrize(
    ("shortest", "longest", "step", "count"),
    [(256, 1024, 64, 25), (256, 1024, 32, 49), (256, 1536, 64, 29), (512, 1536, 32, 43), (512, 2048, 64, 33),
     (256, 2048, 64, 41), (512, 2048, 32, 65), (256, 2048, 32, 81)],
)  # fmt: skip
def test_bucket_counts_at_1024(shortest: int, longest: int, step: int, count: int):
    """How many buckets of about 1024² pixels there are."""
    sizes = bucket_resolutions((1024, 1024), shortest, longest, step)
    assert len(sizes) == count
    assert {size[::-1] for size in sizes} == {*sizes}


@pytest.mark.parametrize(
    ("size", "step", "bucket", "resized", "corner"),
    [
        ((1920, 1080), 64, (1344, 768), (1365, 768), (10, 0)),
        ((1080, 1920), 64, (768, 1344), (768, 1365), (0, 10)),
        ((1000, 1500), 64, (832, 1216), (832, 1248), (0, 16)),
        ((640, 480), 64, (1152, 896), (1195, 896), (21, 0)),
        ((513, 511), 64, (1024, 1024), (1028, 1024), (2, 0)),
        ((1000, 1500), 32, (832, 1248), (832, 1248), (0, 0)),
        ((640, 480), 32, (1184, 864), (1184, 888), (0, 12)),
        ((3000, 800), 32, (1952, 512), (1952, 521), (0, 4)),
    ],
)
def test_placement_at_1024(
    size: tuple[int, int], step: int, bucket: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
):
    """The bucket, the resized image and the corner of the crop for images of usual sizes."""
    dataset = make_dataset((1024, 1024), bucket_reso_steps=step, max_bucket_reso=2048)
    assert assign_bucket(size, dataset) == ResizeCrop(resized, bucket, corner)
