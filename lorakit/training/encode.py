"""Encoding what can be encoded once, and freeing the encoders that nothing needs after that."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from attrs import field, frozen

from lorakit.data.cache.encode import EncodeOptions, LatentKeys, encode_captions, encode_latents
from lorakit.data.cache.vae import OnlineEncoder
from lorakit.data.index import default_workers
from lorakit.data.prompts import CachedPrompts, LivePrompts, Prompts
from lorakit.models.conditioning import collate
from lorakit.models.interfaces import DiffusionModel
from lorakit.training.prepare import PreparedRun
from lorakit.training.progress import Display, Pace, Position, display
from lorakit.training.runtime.distributed import Distributed

_DELAY = 0.5
"""Seconds that encoding takes before anything is shown of it."""


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


def encode_data(prepared: PreparedRun, model: DiffusionModel, processes: Distributed) -> Encoded:
    """Fill the cache with all that stays the same over the run: this process's share, and wait for the others."""
    model.memo = prepared.cache.memo
    filled: dict[str, Filled] = {}
    keys, live = _images(prepared, model, processes, filled)
    captions = _captions(prepared, model, processes, filled)
    prepared.cache.memo.save()
    processes.wait()
    return Encoded(keys, captions, live, filled)


def _images(
    prepared: PreparedRun, model: DiffusionModel, processes: Distributed, filled: dict[str, Filled]
) -> tuple[LatentKeys, OnlineEncoder | None]:
    datasets, data = (*prepared.datasets, *prepared.validation), prepared.config.data
    with _progress("encoding images", processes) as progress:
        keys = encode_latents(datasets, model, prepared.cache, _encoding(prepared, processes, progress.show))
    if keys:
        filled["images"] = _filled(progress.done, keys.values(), processes)
    if not prepared.encodes_images:
        model.free("vae_encoder")
        return keys, None
    workers = data.workers or default_workers()
    return keys, OnlineEncoder(
        encoder=model.vae_encoder, device=processes.device, batch_size=data.encode_batch_size, workers=workers
    )


def _captions(
    prepared: PreparedRun, model: DiffusionModel, processes: Distributed, filled: dict[str, Filled]
) -> Prompts:
    config, datasets = prepared.config, (*prepared.datasets, *prepared.validation)
    if prepared.encodes_captions:
        return LivePrompts(partial(model.text_encoder.tokenize, weighted=config.data.weighted_captions))
    with _progress("encoding captions", processes) as progress:
        keys = encode_captions(datasets, model, prepared.cache, _encoding(prepared, processes, progress.show))
    filled["captions"] = _filled(progress.done, keys.values(), processes)
    model.free("text_encoder")
    return CachedPrompts(prepared.cache, keys, partial(collate, model))


def _filled(new: int, keys: Iterable[str], processes: Distributed) -> Filled:
    """What all processes together have added to the cache, of these keys."""
    added = int(processes.sum(torch.tensor(float(new), device=processes.device)).item())
    return Filled(added, len(set(keys)) - added)


def _encoding(prepared: PreparedRun, processes: Distributed, progress: Callable[[int, int], None]) -> EncodeOptions:
    data = prepared.config.data
    return EncodeOptions(
        device=processes.device,
        batch_size=data.encode_batch_size,
        workers=data.workers,
        rank=processes.rank,
        world_size=processes.world_size,
        weighted_captions=data.weighted_captions,
        progress=progress,
    )


class _Progress:
    """Shows how many entries are encoded, where that takes a while."""

    def __init__(self, title: str, display: Display | None) -> None:
        self.done = 0
        self._title = title
        self._display = display
        self._pace = Pace()
        self._began = time.monotonic()

    def show(self, done: int, total: int) -> None:
        """Show that so many are done."""
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
