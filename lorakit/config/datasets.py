"""Which images and captions to train on, and how: one class per table of a dataset file.

The keys and their meaning are those of sd-scripts' dataset files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from attrs import field, frozen
from attrs import validators as v

from lorakit.errors import Problem

LARGEST_SIDE = 16384
"""Longest side of an image in pixels, as it is trained on."""


@frozen(kw_only=True)
class SubsetConfig:
    """A folder of images and caption files, and how they are used."""

    image_dir: Path
    """Folder with the images (.png .jpg .jpeg .webp .bmp), not searched recursively."""
    num_repeats: int = field(default=1, validator=v.ge(1))
    """How often each image appears in an epoch."""
    caption_extension: str | None = None
    """Extension of the caption files; when absent, `.txt` and then `.caption` are looked for."""
    class_tokens: str | None = None
    """Caption of images that have no caption file."""
    caption_separator: str = field(default=",", validator=v.min_len(1))
    """What separates the tags of a caption."""
    shuffle_caption: bool = False
    """Shuffle the tags of a caption anew in each epoch."""
    keep_tokens: int = field(default=0, validator=v.ge(0))
    """How many tags at the start of a caption keep their place when it is shuffled."""
    flip_aug: bool = False
    """Mirror each image left to right in half of the epochs."""


@frozen(kw_only=True)
class DatasetConfig:
    """Subsets that share a resolution and a batch size."""

    subsets: tuple[SubsetConfig, ...] = field(validator=v.min_len(1))
    """The folders of this dataset."""
    resolution: tuple[int, int] = field(validator=v.deep_iterable([v.ge(64), v.le(LARGEST_SIDE)]))
    """Width and height in pixels; one number stands for a square. With buckets, the area of the images."""
    batch_size: int = field(default=1, validator=v.ge(1))
    """Images per micro-batch and process."""
    enable_bucket: bool = False
    """Keep aspect ratios: sort images into buckets of about the same area instead of cropping to one size."""
    min_bucket_reso: int = field(default=256, validator=[v.ge(64), v.le(LARGEST_SIDE)])
    """Shortest side of a bucket in pixels; rounded down to a multiple of `bucket_reso_steps`."""
    max_bucket_reso: int = field(default=1024, validator=[v.ge(64), v.le(LARGEST_SIDE)])
    """Longest side of a bucket in pixels; rounded up to a multiple of `bucket_reso_steps`."""
    bucket_reso_steps: int = field(default=64, validator=[v.ge(8), v.le(LARGEST_SIDE)])
    """Sides of buckets are multiples of this many pixels."""
    bucket_no_upscale: bool = False
    """Never enlarge an image; its bucket is its own size, rounded down."""

    def problems(self) -> Iterator[Problem]:
        """Combinations that make no sense; keys are field names."""
        if self.bucket_reso_steps % 8:
            yield Problem("bucket_reso_steps", f"must be a multiple of 8, not {self.bucket_reso_steps}", "64 is usual")
        shorter, longer = sorted(self.resolution)
        if not self.enable_bucket and (shorter % 8 or longer % 8):
            width, height = self.resolution
            yield Problem("resolution", f"must have sides that are multiples of 8, not {width}x{height}")
        if self.enable_bucket and not self.bucket_no_upscale:
            if self.min_bucket_reso > shorter:
                message = f"must be at most {shorter}, the resolution's shorter side, not {self.min_bucket_reso}"
                yield Problem("min_bucket_reso", message)
            if self.max_bucket_reso < longer:
                message = f"must be at least {longer}, the resolution's longer side, not {self.max_bucket_reso}"
                yield Problem("max_bucket_reso", message)


@frozen(kw_only=True)
class DataSection:
    """What to train on; with `config`, a dataset file in sd-scripts' format says it."""

    datasets: tuple[DatasetConfig, ...] = field(validator=v.min_len(1))
    """The datasets; each has its own resolution and batch size."""
    cache_dir: Path | None = None
    """Folder for encoded images and captions, which runs may share; `cache` in the output folder when absent."""
    workers: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Threads that decode images while they are encoded; one per processor core, at most 8, when absent."""
    encode_batch_size: int = field(default=1, validator=v.ge(1))
    """Images that the VAE encodes at once while the cache is filled."""
