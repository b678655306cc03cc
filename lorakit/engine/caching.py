"""Encoding what can be encoded once, and freeing the encoders that nothing needs after that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from attrs import frozen

from lorakit.data.encoding import Captions, Encoding, LatentKeys, encode_captions, encode_latents
from lorakit.data.examples import default_workers
from lorakit.data.latents import LiveEncoder
from lorakit.engine.preparation import PreparedRun
from lorakit.engine.processes import Processes
from lorakit.models.protocol import DiffusionModel


@frozen
class Encoded:
    """Where images and captions are in the cache, and what encodes those that are not."""

    latent_keys: LatentKeys
    """Where latents are."""
    captions: Captions
    """Where captions are, or what tokenizes them in each step."""
    live: LiveEncoder | None
    """What encodes images that change from epoch to epoch; None where there are none."""


def encode_data(prepared: PreparedRun, model: DiffusionModel, processes: Processes) -> Encoded:
    """Fill the cache with all that stays the same over the run: this process's share, and wait for the others."""
    model.memo = prepared.cache.memo
    keys, live = _images(prepared, model, processes)
    captions = _captions(prepared, model, processes)
    prepared.cache.memo.save()
    processes.wait()
    return Encoded(keys, captions, live)


def _images(
    prepared: PreparedRun, model: DiffusionModel, processes: Processes
) -> tuple[LatentKeys, LiveEncoder | None]:
    datasets, data = (*prepared.datasets, *prepared.validation), prepared.config.data
    with _progress("encoding images", processes) as progress:
        keys = encode_latents(datasets, model, prepared.cache, _encoding(prepared, processes, progress))
    if not prepared.encodes_images:
        model.free("image_encoder")
        return keys, None
    workers = data.workers or default_workers()
    return keys, LiveEncoder(
        encoder=model.image_encoder, device=processes.device, batch_size=data.encode_batch_size, workers=workers
    )


def _captions(prepared: PreparedRun, model: DiffusionModel, processes: Processes) -> Captions:
    config, datasets = prepared.config, (*prepared.datasets, *prepared.validation)
    if prepared.encodes_captions:
        return partial(model.text_encoder.tokenize, weighted=config.data.weighted_captions)
    with _progress("encoding captions", processes) as progress:
        keys = encode_captions(datasets, model, prepared.cache, _encoding(prepared, processes, progress))
    model.free("text_encoder")
    return keys


def _encoding(prepared: PreparedRun, processes: Processes, progress: Callable[[int, int], None]) -> Encoding:
    data = prepared.config.data
    return Encoding(
        device=processes.device,
        batch_size=data.encode_batch_size,
        workers=data.workers,
        rank=processes.rank,
        world_size=processes.world_size,
        weighted_captions=data.weighted_captions,
        progress=progress,
    )


@contextmanager
def _progress(title: str, processes: Processes) -> Iterator[Callable[[int, int], None]]:
    """A callback that draws a progress bar from its first call on; on the main process only."""
    from tqdm import tqdm

    bar = tqdm(desc=title, disable=not processes.is_main, delay=0.5, dynamic_ncols=True)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        bar.close()
