"""Encoding: images and captions through the frozen encoders into the cache, each distinct content once.

Shapes: B images or captions encoded together, H and W bucket sides in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

import torch
from attrs import field, frozen
from torch import Tensor

from lorakit.data.cache.parallel import map_chunked, map_prefetch
from lorakit.data.cache.store import Cache, NotFiniteError, content_key, to_storable
from lorakit.data.cache.vae import encode_pixels, latent_masks, not_encodable, on_device
from lorakit.data.captions import caption_variants
from lorakit.data.images.augmentation import Picture, load_picture
from lorakit.data.images.decode import filter_name
from lorakit.data.index import Example, IndexedDataset, default_workers
from lorakit.errors import DataError, data_error
from lorakit.models.conditioning import encode_frozen, split
from lorakit.models.interfaces import DiffusionModel

T = TypeVar("T")

LatentKeys = Mapping[tuple[str, bool], str]
"""Where the latents of an example are in the cache, by its identity and whether it is mirrored."""

CaptionKeys = Mapping[str, str]
"""Where the conditioning of a caption is in the cache, by the caption."""

_LATENT_FORMAT = 1
_CAPTION_FORMAT = 1
CAPTIONS_AT_ONCE = 16
"""Captions that are encoded together."""
_BATCHES_PER_READ = 16
"""Batches of captions that one text encoder encodes before the next is read, where only one is in memory."""


@frozen(kw_only=True)
class EncodeOptions:
    """How the cache is filled."""

    device: torch.device
    """Where the encoders are."""
    batch_size: int = 1
    """Images of one bucket that are encoded at once."""
    workers: int | None = None
    """Image decoding threads; defaults to one per CPU core, at most 8."""
    rank: int = 0
    """Number of this process."""
    world_size: int = 1
    """Processes that share the work; each must be given the same datasets."""
    weighted_captions: bool = False
    """Whether brackets in captions say how much the words in them count."""
    keep_unwritten: bool = False
    """Whether entries that the disk does not take are kept in memory; else they are errors."""
    progress: Callable[[int, int], None] | None = None
    """Told after each batch how many of this process's missing entries are done, and how many there are."""


@frozen
class _Job:
    """An image to decode once, and the keys of the entries to make of it, by whether they are mirrored."""

    example: Example
    keys: dict[bool, str] = field(factory=dict)


@frozen
class _Encoded:
    """Entries for the cache, still on the encoder's device."""

    keys: Sequence[str]
    names: Sequence[str]
    rows: Sequence[Mapping[str, Tensor]]
    """The tensors of each entry, mostly views of those of a batch."""
    masks: Sequence[Tensor | None] = ()
    """What only some of the entries have, already on the CPU."""


def encode_latents(
    datasets: Sequence[IndexedDataset], model: DiffusionModel, cache: Cache, encoding: EncodeOptions
) -> LatentKeys:
    """Fill the cache with this process's share of the missing latents: `mean` and `std`, float32 [C, h, w] each.

    Where the loss is to count in parts of an image only, there is a `mask` too, float32 [1, h, w]. Images whose
    pixels change from epoch to epoch are left out, but decoded once, to find those that cannot be.

    The image encoder is read only if something is missing. Raises one DataError for all damaged
    images, after the whole ones are encoded, and one at once where the encoder gives NaN.
    """
    workers = encoding.workers or default_workers()
    with ThreadPoolExecutor(workers) as pool:
        damaged = _damaged(datasets, cache, encoding, pool)
        keys, jobs = _latent_jobs(datasets, model.fingerprint("vae_encoder", cache.memo), cache, pool)
        missing = []
        for job in _own(jobs, encoding):
            absent = {mirrored: key for mirrored, key in job.keys.items() if not cache.has(key)}
            missing += [_Job(job.example, absent)] if absent else []
        if missing:
            decoded = map_prefetch(pool, _decode, missing, 2 * max(encoding.batch_size, workers))
            batches = _same_size(decoded, encoding.batch_size, damaged)
            encoded = (entries for batch in batches for entries in _encode_images(batch, model, encoding.device))
            _store_all(encoded, cache, sum(len(job.keys) for job in missing), encoding)
    if damaged:
        raise data_error(damaged)
    return keys


def encode_captions(
    datasets: Sequence[IndexedDataset], model: DiffusionModel, cache: Cache, encoding: EncodeOptions
) -> CaptionKeys:
    """Fill the cache with this process's share of the missing conditioning of all that captions may become.

    Captions that vary freely are left out. The text encoder is read only if something is missing.
    Raises DataError where it gives NaN.
    """
    fingerprint = model.fingerprint("text_encoder", cache.memo)
    examples = [example for dataset in datasets for example in dataset.examples]
    captions = dict.fromkeys(
        text for example in examples for text in caption_variants(example.caption, example.subset) or ()
    )
    kind = "caption with weights" if encoding.weighted_captions else "caption"
    keys = {caption: content_key(kind, _CAPTION_FORMAT, caption, fingerprint) for caption in captions}
    missing = [caption for caption in _own(list(keys), encoding) if not cache.has(keys[caption])]

    def encoded() -> Iterator[_Encoded]:
        for group in _chunks(_chunks(missing, CAPTIONS_AT_ONCE), _BATCHES_PER_READ):
            conditionings = encode_frozen(model, group, encoding.weighted_captions)
            for chunk, conditioning in zip(group, conditionings, strict=True):
                names = [f"caption {text!r}" for text in chunk]
                yield _Encoded([keys[caption] for caption in chunk], names, split(model, conditioning))

    if missing:
        _store_all(encoded(), cache, len(missing), encoding)
    return keys


def _latent_jobs(
    datasets: Sequence[IndexedDataset], fingerprint: str, cache: Cache, pool: Executor
) -> tuple[LatentKeys, list[_Job]]:
    """The keys of all latents, and one job for each distinct image and placement, bucket by bucket."""
    examples = [example for dataset in datasets for example in dataset.examples if not example.is_augmented]

    def content(example: Example) -> tuple[object, ...]:
        """What its latents depend on, beside the encoder; reads its files only where they have changed."""
        interpolation, placement = example.subset.resize_interpolation, example.placement
        more = [] if interpolation == "lanczos" else [filter_name(interpolation)]
        if example.mask is not None:
            more.append(cache.memo.digest(example.mask))
        elif example.subset.alpha_mask:
            more.append("alpha")
        return cache.memo.digest(example.image), placement, *more

    keys: dict[tuple[str, bool], str] = {}
    jobs: dict[tuple[object, ...], _Job] = {}
    for example, seen in zip(examples, map_chunked(pool, content, examples), strict=True):
        job = jobs.setdefault(seen, _Job(example))
        digest, _, *more = seen
        size, bucket = example.placement.resized, example.placement.bucket
        for mirrored in (False, True) if example.subset.flip_aug else (False,):
            key = content_key("latents", _LATENT_FORMAT, digest, size, bucket, mirrored, fingerprint, *more)
            keys[example.sample_id, mirrored] = job.keys[mirrored] = key
    cache.memo.save()
    return keys, sorted(jobs.values(), key=lambda job: job.example.placement.bucket)


def _chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """The items in order, `size` at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _own(work: Sequence[T], encoding: EncodeOptions) -> Sequence[T]:
    """The share of one process: of all work, not of what is missing, which changes while others store entries."""
    return work[encoding.rank :: encoding.world_size]


def _damaged(datasets: Sequence[IndexedDataset], cache: Cache, encoding: EncodeOptions, pool: Executor) -> list[str]:
    """What is wrong with images that are encoded later; files that were decoded once are not read again."""
    augmented = (example for dataset in datasets for example in dataset.examples if example.is_augmented)
    examples = list({(example.image, example.mask): example for example in augmented}.values())

    def problem(example: Example) -> str | None:
        try:
            mask = cache.memo.digest(example.mask) if example.mask else "none"

            def decode() -> str:
                load_picture(example, example.placement)
                return mask

            cache.memo.get_or_compute(example.image, f"decodes with mask {mask}", decode)
        except DataError as error:
            return str(error)
        return None

    return [text for text in map_chunked(pool, problem, _own(examples, encoding)) if text]


def _decode(job: _Job) -> tuple[_Job, Picture | DataError]:
    try:
        return job, load_picture(job.example, job.example.placement)
    except DataError as error:
        return job, error


def _same_size(
    decoded: Iterable[tuple[_Job, Picture | DataError]], batch_size: int, damaged: list[str]
) -> Iterator[list[tuple[_Job, Picture]]]:
    """Batches of neighbours of one size; what could not be decoded is left out and noted."""
    batch: list[tuple[_Job, Picture]] = []
    for job, picture in decoded:
        if isinstance(picture, DataError):
            damaged.append(str(picture))
            continue
        if batch and (len(batch) == batch_size or batch[0][1].pixels.shape != picture.pixels.shape):
            yield batch
            batch = []
        batch.append((job, picture))
    if batch:
        yield batch


def _encode_images(
    batch: Sequence[tuple[_Job, Picture]], model: DiffusionModel, device: torch.device
) -> Iterator[_Encoded]:
    """Latents of a batch as they are missing: once upright, once mirrored."""
    pixels = on_device([picture.pixels for _, picture in batch], device)
    for mirrored in (False, True):
        rows = [row for row, (job, _) in enumerate(batch) if mirrored in job.keys]
        if rows:
            own = torch.stack([pixels[row] for row in rows])  # a list as index would be copied to the device first
            tensors = encode_pixels(own.flip(2) if mirrored else own, model.vae_encoder)
            jobs, pictures = [batch[row][0] for row in rows], [batch[row][1] for row in rows]
            masks = latent_masks([picture.mask for picture in pictures], tensors["mean"])
            if mirrored:
                masks = [None if mask is None else mask.flip(2) for mask in masks]
            entries = [{name: tensor[row] for name, tensor in tensors.items()} for row in range(len(rows))]
            yield _Encoded([job.keys[mirrored] for job in jobs], [own.name for own in pictures], entries, masks)


def _store_all(encoded: Iterable[_Encoded], cache: Cache, total: int, encoding: EncodeOptions) -> None:
    """Write entries in a thread of their own, so that the encoder does not wait for the disk.

    On a GPU that thread also waits for what is encoded. On a CPU it computes nothing: that would slow the encoder down.
    """

    def write(entries: Mapping[str, Mapping[str, Tensor]]) -> int:
        for key, entry in entries.items():
            cache.write(key, entry, keep_unwritten=encoding.keep_unwritten)
        return len(entries)

    done = 0
    with ThreadPoolExecutor(1) as writer:
        if encoding.device.type == "cpu":
            batches = map_prefetch(writer, write, map(_entries, encoded), ahead=4)
        else:
            batches = map_prefetch(writer, lambda own: write(_entries(own)), encoded, ahead=4)
        for stored in batches:
            done += stored
            if encoding.progress:
                encoding.progress(done, total)


def _entries(encoded: _Encoded) -> dict[str, dict[str, Tensor]]:
    """The entries of a batch as the cache is to hold them, by key. Raises DataError where one is not finite."""
    entries = {}
    masks = encoded.masks or [None] * len(encoded.keys)
    for key, name, entry, mask in zip(encoded.keys, encoded.names, encoded.rows, masks, strict=True):
        try:
            entries[key] = to_storable(entry if mask is None else {**entry, "mask": mask})
        except NotFiniteError as error:
            raise not_encodable(name, error, is_image=bool(encoded.masks)) from error
    return entries
