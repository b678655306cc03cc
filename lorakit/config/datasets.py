"""The images and captions to train on, and how to use them: one class per table of a dataset file.

The keys and their meaning are those of sd-scripts' dataset files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.dataset_source import DatasetSourceConfig
from lorakit.errors import Problem
from lorakit.utils.wording import shown_path

LARGEST_SIDE = 16384
"""Longest training side of an image in pixels."""

Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]
"""Resampling filters; `linear`, `cubic` and `area` are aliases of `bilinear`, `bicubic` and `box`."""


@frozen(kw_only=True)
class SubsetConfig:
    """A set of images and captions, usually a folder, and how to use it."""

    image_dir: Path
    """Folder with the images (PNG, JPEG, WebP, AVIF, TIFF, BMP, GIF); subfolders are not searched."""
    metadata_file: Path | None = None
    """JSON, JSON Lines or CSV file that lists images with captions and tags, such as the Hub's `metadata.jsonl`;
    `image_dir` defaults to its folder."""
    source: DatasetSourceConfig | None = None
    """Where images and captions come from: the name of a dataset source, whose options are in the same table;
    `metadata_file` if that key is set, else `folder`."""
    num_repeats: int = field(default=1, validator=v.ge(0))
    """How often each image appears in an epoch; 0 disables the subset."""
    caption_extension: str | None = None
    """Extension of caption files; by default `.txt`, else `.caption`."""
    class_tokens: str | None = None
    """Caption of images without a caption file."""
    caption_separator: str = field(default=",", validator=v.min_len(1))
    """Separator between the tags of a caption."""
    shuffle_caption: bool = False
    """Shuffle the tags of a caption in every epoch."""
    keep_tokens: int = field(default=0, validator=v.ge(0))
    """Number of tags at the start of a caption that are neither shuffled nor dropped."""
    keep_tokens_separator: str = ""
    """Marker in a caption, such as `|||`, after the tags to keep in place; a second one precedes tags to keep at the
    end. It overrides `keep_tokens` and is removed from the caption."""
    secondary_separator: str = ""
    """Separator between tags to keep together, such as `;;;`; replaced by `caption_separator` after shuffling."""
    enable_wildcard: bool = False
    """Pick a random line of a caption file and a random option of `{red|green|blue}`; `{{` and `}}` are literal
    braces."""
    caption_prefix: str = ""
    """Text before every caption, followed by a space; part of the first tag."""
    caption_suffix: str = ""
    """Text after every caption, preceded by a space; part of the last tag."""
    caption_dropout_rate: float = field(default=0.0, validator=[v.ge(0), v.le(1)])
    """Probability of training an image with an empty caption."""
    caption_dropout_every_n_epochs: int = field(default=0, validator=v.ge(0))
    """Use empty captions in every N-th epoch; 0 disables it."""
    caption_tag_dropout_rate: float = field(default=0.0, validator=[v.ge(0), v.le(1)])
    """Probability of dropping each tag, except those kept in place."""
    token_warmup_step: float = field(default=0.0, validator=v.ge(0))
    """Steps over which captions grow from `token_warmup_min` tags to all of them; below 1, a fraction of the run."""
    token_warmup_min: int = field(default=1, validator=v.ge(0))
    """Number of tags at the start of `token_warmup_step`, not counting those kept in place."""
    flip_aug: bool = False
    """Flip each image horizontally in half of the epochs."""
    color_aug: bool = False
    """Slightly change the hue or gamma of each image in a third of the epochs."""
    random_crop: bool = False
    """Crop at a random position in each epoch instead of the centre."""
    face_crop_aug_range: tuple[float, float] | None = None
    """Crop around the face given in the file name (`…_x_y_width_height.png`, its centre and size in pixels), in each
    epoch with a random shorter side between these two multiples of the face's size."""
    resize_interpolation: Interpolation = "lanczos"
    """Resampling filter for resizing. `area` is the exact mean of the area that a pixel covers, and linear for
    enlarging, as in OpenCV; `box`, Pillow's, is the mean of the pixels whose centres are in that area."""
    alpha_mask: bool = False
    """Use the alpha channel as loss mask; transparent pixels keep their RGB values."""
    conditioning_data_dir: Path | None = None
    """Folder with a loss mask for each image, of the same name and size; white or red areas count."""
    is_reg: bool = False
    """Regularisation (class) images, repeated to match the number of training images; loss weighted by
    `data.prior_loss_weight`."""

    @property
    def place(self) -> str:
        """Where the images are, for messages: the metadata file, the folder, or the chosen source."""
        return f"source {self.source.name!r}" if self.source else shown_path(self.metadata_file or self.image_dir)

    @property
    def changes_tags(self) -> bool:
        """Whether the tags of a caption may be shuffled or dropped."""
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0 or self.token_warmup_step > 0

    def problems(self) -> Iterator[Problem]:
        """Conflicting separators; keys are field names."""
        if self.keep_tokens_separator and self.keep_tokens_separator in self.caption_separator:
            yield Problem("keep_tokens_separator", "must not be part of caption_separator", '"|||" is usual')
        if self.secondary_separator and self.caption_separator in self.secondary_separator:
            message = f"must not contain caption_separator, {self.caption_separator!r}, which would split it"
            yield Problem("secondary_separator", message, '";;;" is usual')
        low, high = self.face_crop_aug_range or (1, 1)
        if not 0 < low <= high:
            message = f"must be two numbers above 0, the greater one last, not [{low:g}, {high:g}]"
            yield Problem("face_crop_aug_range", message, "[2.0, 4.0] is usual")


@frozen(kw_only=True)
class DatasetConfig:
    """Subsets that share a resolution and a batch size."""

    subsets: tuple[SubsetConfig, ...] = field(validator=v.min_len(1))
    """The subsets of this dataset."""
    resolution: tuple[int, int] = field(validator=v.deep_iterable([v.ge(64), v.le(LARGEST_SIDE)]))
    """Width and height in pixels, or one number for a square. With buckets, its area is the area of the images."""
    batch_size: int = field(default=1, validator=v.ge(1))
    """Images per micro-batch and process."""
    enable_bucket: bool = False
    """Keep aspect ratios: sort images into buckets of about the same area instead of cropping all to one size."""
    min_bucket_reso: int = field(default=256, validator=[v.ge(64), v.le(LARGEST_SIDE)])
    """Shortest side of a bucket in pixels; rounded down to a multiple of `bucket_reso_steps`."""
    max_bucket_reso: int = field(default=1024, validator=[v.ge(64), v.le(LARGEST_SIDE)])
    """Longest side of a bucket in pixels; rounded up to a multiple of `bucket_reso_steps`."""
    bucket_reso_steps: int = field(default=64, validator=[v.ge(8), v.le(LARGEST_SIDE)])
    """Sides of buckets are multiples of this many pixels."""
    bucket_no_upscale: bool = False
    """Never upscale; an image's bucket is its own size, rounded down."""
    validation_split: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    """Fraction of each subset's images to hold out for validation; at least one image remains for training."""
    validation_seed: int | None = None
    """Seed for choosing the validation images and their noise; defaults to `training.seed`."""

    @property
    def active_subsets(self) -> tuple[SubsetConfig, ...]:
        """The enabled subsets."""
        return tuple(subset for subset in self.subsets if subset.num_repeats)

    def seed_of_validation(self, seed: int) -> int:
        """Its `validation_seed`, or `seed` if absent."""
        return seed if self.validation_seed is None else self.validation_seed

    def problems(self) -> Iterator[Problem]:
        """Conflicting keys; keys are field names."""
        active = self.active_subsets
        if active and all(subset.is_reg for subset in active):
            hint = "put them into the dataset of the images that they belong to, as a subset with is_reg"
            yield Problem("subsets", "are all regularisation images", hint)
        if self.enable_bucket and any(subset.face_crop_aug_range for subset in self.subsets):
            hint = "set enable_bucket to false, or put the images of the subset into a dataset of their own"
            yield Problem("enable_bucket", "cannot be combined with face_crop_aug_range, which crops to one size", hint)
        if self.bucket_reso_steps % 8:
            yield Problem("bucket_reso_steps", f"must be a multiple of 8, not {self.bucket_reso_steps}", "64 is usual")
        shorter, longer = sorted(self.resolution)
        if not self.enable_bucket and (shorter % 8 or longer % 8):
            width, height = self.resolution
            yield Problem("resolution", f"must have sides that are multiples of 8, not {width}x{height}")
        if self.enable_bucket and not self.bucket_no_upscale:
            if self.min_bucket_reso > shorter:
                message = f"must be at most {shorter}, the shorter side of resolution, not {self.min_bucket_reso}"
                yield Problem("min_bucket_reso", message, f"set min_bucket_reso = {max(shorter // 64 * 64, 64)}")
            if self.max_bucket_reso < longer:
                message = f"must be at least {longer}, the longer side of resolution, not {self.max_bucket_reso}"
                yield Problem("max_bucket_reso", message)


@frozen(kw_only=True)
class DataSection:
    """The training data; with `config`, from a dataset file in sd-scripts' format."""

    datasets: tuple[DatasetConfig, ...] = field(validator=v.min_len(1))
    """The datasets; each has its own resolution and batch size."""
    cache_dir: Path | None = None
    """Folder for cached latents and text embeddings, which runs may share; defaults to `cache` in the output folder."""
    workers: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Image decoding threads; defaults to one per CPU core, at most 8."""
    encode_batch_size: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Batch size of the VAE encoder. If absent, up to 8 images of one size on CUDA, as many as fit in half of the free
    memory; 1 on other devices, with `training.deterministic`, and for images that are encoded in each step. Larger
    batches may change the rounding of latents."""
    weighted_captions: bool = False
    """Interpret brackets in captions as weights: `(red:1.3)` is weighted by 1.3, `(red)` by 1.1, `[red]` by 1/1.1."""
    prior_loss_weight: float = field(default=1.0, validator=v.ge(0))
    """Loss weight of regularisation images, the subsets with `is_reg`."""

    def problems(self) -> Iterator[Problem]:
        """Whether every subset is disabled; keys are field names."""
        if not any(dataset.active_subsets for dataset in self.datasets):
            yield Problem("num_repeats", "is 0 in every subset, so there is nothing to train on", "1 is usual")
