"""Encode once what stays the same, and free the encoders that nothing needs then; encode the rest in each step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from attrs import evolve, field, frozen

from lorakit.data.cache.encode import EncodeOptions, LatentKeys, encode_captions, encode_latents
from lorakit.data.cache.vae import OnlineEncoder
from lorakit.data.index import default_workers
from lorakit.data.loader import Batch, CachedPrompts, LivePrompts, Prompts
from lorakit.models.conditioning import collate
from lorakit.models.interfaces import Conditioning, DiffusionModel
from lorakit.training.prepare import PreparedRun
from lorakit.training.progress import Display, Pace, Position, display
from lorakit.training.runtime.distributed import Distributed

_DELAY = 0.5
"""Seconds that encoding takes before anything is shown of it."""
_BYTES_PER_PIXEL = 2600
"""What encoding an image takes with Stable Diffusion's VAE in float32; other VAEs are of the same kind."""
_MAX_AT_ONCE = 8
"""Images that are encoded together at most; from then on a GPU is busy with each image."""


@frozen
class Filled:
    """How many entries the cache got, and how many it had."""

    new: int
    there: int


@frozen
class Encoded:
    """Where images and captions are in the cache, and what encodes those that are not."""

    latent_keys: LatentKeys
    """Where latents are."""
    captions: Prompts
    """What gives the captions of a batch."""
    live: OnlineEncoder | None
    """What encodes images that change from epoch to epoch; None where there are none."""
    filled: Mapping[str, Filled] = field(factory=dict)
    """What encoding has added to the cache: `images`, mirrored ones counted too, and `captions`, unless each step
    encodes them."""


def encode_data(
    prepared: PreparedRun, model: DiffusionModel, processes: Distributed, *, keep_unwritten: bool = False
) -> Encoded:
    """Fill the cache with all that stays the same over the run: this process's share, and wait for the others.

    With `keep_unwritten`, entries that the disk does not take are kept in memory.
    """
    data, cache = prepared.config.data, prepared.cache
    datasets = (*prepared.datasets, *prepared.validation)
    options = EncodeOptions(
        device=processes.device,
        batch_size=_images_at_once(prepared, processes.device),
        workers=data.workers,
        rank=processes.rank,
        world_size=processes.world_size,
        weighted_captions=data.weighted_captions,
        keep_unwritten=keep_unwritten,
    )
    filled: dict[str, Filled] = {}
    online: OnlineEncoder | None = None
    with _progress("encoding images", processes) as progress:
        keys = encode_latents(datasets, model, cache, evolve(options, progress=progress.show))
    if keys:
        filled["images"] = _filled(progress.done, keys.values(), processes)
    if prepared.encodes_images:
        workers = data.workers or default_workers()
        online = OnlineEncoder(
            encoder=model.vae_encoder, device=processes.device, batch_size=data.encode_batch_size or 1, workers=workers
        )
    else:
        model.free("vae_encoder")
    captions: Prompts
    if prepared.encodes_captions:
        captions = LivePrompts(partial(model.text_encoder.tokenize, weighted=data.weighted_captions))
    else:
        with _progress("encoding captions", processes) as progress:
            text_keys = encode_captions(datasets, model, cache, evolve(options, progress=progress.show))
        filled["captions"] = _filled(progress.done, text_keys.values(), processes)
        captions = CachedPrompts(cache, text_keys, partial(collate, model))
        model.free("text_encoder")
    cache.memo.save()
    processes.barrier()
    return Encoded(keys, captions, online, filled)


def _images_at_once(prepared: PreparedRun, device: torch.device) -> int:
    """Images of one size to encode at once for the cache, in float32 at most."""
    config = prepared.config
    if config.data.encode_batch_size is not None:
        return config.data.encode_batch_size
    # Rounding may depend on the batch, and batches on what is already cached. One by one, a run that was killed and
    # started again has the same latents. CPUs are no faster with more.
    if device.type != "cuda" or config.training.deterministic:
        return 1
    examples = (example for dataset in (*prepared.datasets, *prepared.validation) for example in dataset.examples)
    largest = max(math.prod(example.placement.bucket) for example in examples)
    free, _ = torch.cuda.mem_get_info(device)
    return min(max(free // 2 // (_BYTES_PER_PIXEL * largest), 1), _MAX_AT_ONCE)


def conditioning_of(batch: Batch, model: DiffusionModel, trains_text_encoders: bool) -> Conditioning:
    """The batch's conditioning: from the cache, or from the text encoder as it is now."""
    by_sizes = batch.image_conditioning or {}
    if batch.tokens is None:
        return {**(batch.conditioning or {}), **by_sizes}
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains_text_encoders):
        return {**model.text_encoder.encode(batch.tokens), **by_sizes}


def _filled(new: int, keys: Iterable[str], processes: Distributed) -> Filled:
    """What all processes together have added to the cache, of these keys."""
    added = int(processes.all_reduce_sum(torch.tensor(float(new), device=processes.device)).item())
    return Filled(added, len(set(keys)) - added)


class _Progress:
    """Shows how many entries are encoded, where that takes a while."""

    def __init__(self, title: str, display: Display | None) -> None:
        self.done = 0
        self._title = title
        self._display = display
        self._pace = Pace()
        self._began = time.monotonic()

    def show(self, done: int, total: int) -> None:
        """Show how many are done."""
        self.done = done
        seconds = time.monotonic() - self._began
        self._pace.add(done, seconds)
        if self._display is not None and seconds > _DELAY:
            position = Position(done=done, total=total, title=self._title, rate=self._pace.rate)
            self._display.show(position)


@contextmanager
def _progress(title: str, processes: Distributed) -> Iterator[_Progress]:
    """What shows progress, on the main process only."""
    shown = display() if processes.is_main else None
    try:
        yield _Progress(title, shown)
    finally:
        if shown is not None:
            shown.close()
