"""Which images and captions to train on, and how: one class per table of a dataset file.

The keys and their meaning are those of sd-scripts' dataset files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import DatasetSourceConfig
from lorakit.errors import Problem
from lorakit.utils.wording import shown_path

LARGEST_SIDE = 16384
"""Longest side of an image in pixels, as it is trained on."""

Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]
"""How images are resampled; `linear`, `cubic` and `area` are other names of `bilinear`, `bicubic` and `box`."""


@frozen(kw_only=True)
class SubsetConfig:
    """A folder of images and caption files, and how they are used."""

    image_dir: Path
    """Folder with the images (PNG, JPEG, WebP, AVIF, TIFF, BMP, GIF), not searched recursively."""
    metadata_file: Path | None = None
    """JSON, JSON Lines or CSV file with the images, their captions and tags, such as the Hub's `metadata.jsonl`;
    `image_dir` is its folder when absent."""
    source: DatasetSourceConfig | None = None
    """Where images and captions come from: the name of a dataset source, whose options are in the same table;
    `metadata_file` if that key is set, else `folder`."""
    num_repeats: int = field(default=1, validator=v.ge(0))
    """How often each image appears in an epoch; 0 switches the subset off."""
    caption_extension: str | None = None
    """Extension of the caption files; when absent, `.txt` and then `.caption` are looked for."""
    class_tokens: str | None = None
    """Caption of images that have no caption file."""
    caption_separator: str = field(default=",", validator=v.min_len(1))
    """What separates the tags of a caption."""
    shuffle_caption: bool = False
    """Shuffle the tags of a caption anew in each epoch."""
    keep_tokens: int = field(default=0, validator=v.ge(0))
    """How many tags at the start of a caption keep their place and are never left out."""
    keep_tokens_separator: str = ""
    """Stands in a caption after the tags that keep their place, such as `|||`; a second one begins those that stay
    last. Where it stands, `keep_tokens` does not count; it is taken out of the caption."""
    secondary_separator: str = ""
    """Stands between tags that stay together, such as `;;;`; becomes `caption_separator` in the end."""
    enable_wildcard: bool = False
    """Use one line of a caption file at random, and of `{red|green|blue}` one part; `{{` and `}}` are braces."""
    caption_prefix: str = ""
    """Stands before every caption, with a space between; part of its first tag."""
    caption_suffix: str = ""
    """Stands after every caption, with a space between; part of its last tag."""
    caption_dropout_rate: float = field(default=0.0, validator=[v.ge(0), v.le(1)])
    """How often an image is trained on an empty caption: 0.1 is one time in ten."""
    caption_dropout_every_n_epochs: int = field(default=0, validator=v.ge(0))
    """All captions are empty in each epoch whose number is a multiple of this; 0 is never."""
    caption_tag_dropout_rate: float = field(default=0.0, validator=[v.ge(0), v.le(1)])
    """How often each tag is left out, those that keep their place apart."""
    token_warmup_step: float = field(default=0.0, validator=v.ge(0))
    """Steps over which captions grow from `token_warmup_min` tags to all of them; below 1, a share of the run."""
    token_warmup_min: int = field(default=1, validator=v.ge(0))
    """Tags in a caption at the start of `token_warmup_step`, those that keep their place apart."""
    flip_aug: bool = False
    """Mirror each image left to right in half of the epochs."""
    color_aug: bool = False
    """Change the hue or the gamma of each image a little in a third of the epochs."""
    random_crop: bool = False
    """Crop each image somewhere else in each epoch, not around its centre."""
    face_crop_aug_range: tuple[float, float] | None = None
    """Crop around the face that the file's name tells of (`…_x_y_width_height.png`, its centre and size in pixels),
    with a shorter side between these two times as long as the face, anew in each epoch."""
    resize_interpolation: Interpolation = "lanczos"
    """How images are made larger or smaller; `area` and `box` average."""
    alpha_mask: bool = False
    """Learn from each part of an image as much as it is opaque; what is transparent keeps its colours."""
    conditioning_data_dir: Path | None = None
    """Folder with a mask for each image, of its name and size: the loss counts where the mask is white or red."""
    is_reg: bool = False
    """Regularisation images: as many as the dataset has others, and weighted by `data.prior_loss_weight`."""

    @property
    def place(self) -> str:
        """Where the images are, for messages: the metadata file, the folder, or the chosen source."""
        return f"source {self.source.name!r}" if self.source else shown_path(self.metadata_file or self.image_dir)

    @property
    def changes_tags(self) -> bool:
        """Whether the tags of a caption may be shuffled or left out."""
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0 or self.token_warmup_step > 0

    def problems(self) -> Iterator[Problem]:
        """Separators that get in each other's way; keys are field names."""
        if self.keep_tokens_separator and self.keep_tokens_separator in self.caption_separator:
            yield Problem("keep_tokens_separator", "must not be a part of caption_separator", '"|||" is usual')
        if self.secondary_separator and self.caption_separator in self.secondary_separator:
            message = f"must not contain caption_separator, {self.caption_separator!r}, which would cut it apart"
            yield Problem("secondary_separator", message, '";;;" is usual')
        low, high = self.face_crop_aug_range or (1, 1)
        if not 0 < low <= high:
            message = f"must be two numbers above 0, the greater one last, not [{low:g}, {high:g}]"
            yield Problem("face_crop_aug_range", message, "[2.0, 4.0] is usual")


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
    validation_split: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    """Share of each subset's images that is not trained on but validated; at least one image stays."""
    validation_seed: int | None = None
    """Chooses the images that are validated, and their noise; `training.seed` when absent."""

    @property
    def active_subsets(self) -> tuple[SubsetConfig, ...]:
        """The subsets that are not switched off."""
        return tuple(subset for subset in self.subsets if subset.num_repeats)

    def seed_of_validation(self, seed: int) -> int:
        """The seed of its own, or the one given where it has none."""
        return seed if self.validation_seed is None else self.validation_seed

    def problems(self) -> Iterator[Problem]:
        """Combinations that make no sense; keys are field names."""
        active = self.active_subsets
        if active and all(subset.is_reg for subset in active):
            hint = "put them into the dataset of the images that they belong to, as a subset with is_reg"
            yield Problem("subsets", "are all regularisation images", hint)
        if self.enable_bucket and any(subset.face_crop_aug_range for subset in self.subsets):
            hint = "set enable_bucket to false, or put the images of the subset into a dataset of their own"
            yield Problem("enable_bucket", "cannot stand beside face_crop_aug_range, which crops to one size", hint)
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
    """Threads that decode images; one per processor core, at most 8, when absent."""
    encode_batch_size: int = field(default=1, validator=v.ge(1))
    """Images that the VAE encodes at once."""
    weighted_captions: bool = False
    """Let brackets in captions weigh words: `(red:1.3)` counts 1.3 times, `(red)` 1.1 times, `[red]` 1/1.1 times."""
    prior_loss_weight: float = field(default=1.0, validator=v.ge(0))
    """How much the loss of regularisation images counts, the subsets with `is_reg`."""

    def problems(self) -> Iterator[Problem]:
        """That every subset is switched off; keys are field names."""
        if not any(dataset.active_subsets for dataset in self.datasets):
            yield Problem("num_repeats", "is 0 in every subset, so there is nothing to train on", "1 is usual")
