"""Batches: what the training loop computes a loss of, made ready ahead of time in the background.

Every number drawn for an image depends on the seed, the epoch, the image and which of its repeats it
is, and on nothing else. Shapes: B images in a micro-batch, C latent channels, h and w latent sides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from attrs import evolve, field, fields, frozen
from torch import Tensor

from lorakit.config.loss import LossSection
from lorakit.data.batch_sampler import RankMicroBatch
from lorakit.data.cache.encode import Captions, LatentKeys
from lorakit.data.cache.parallel import map_prefetch
from lorakit.data.cache.store import Cache
from lorakit.data.cache.vae import OnlineEncoder
from lorakit.data.captions import CaptionContext, apply_caption_options
from lorakit.data.images.augmentation import Picture, augmented_picture, is_mirrored
from lorakit.data.index import Example, IndexedDataset
from lorakit.diffusion.noise import normal, perturbation, target_noise
from lorakit.models.interfaces import Conditioning, Tokens
from lorakit.utils.rng import RngFactory, derived_seed, keyed_generator


@frozen(eq=False)
class Batch:
    """The images of one micro-batch, or one process's share of them."""

    latents: Tensor
    """Latents drawn from the image encoder's distribution, float32 [B, C, h, w]."""
    noise: Tensor
    """Noise to mix in and to predict, float32 [B, C, h, w]."""
    timesteps: Tensor
    """How much of the noise is mixed in, int64 [B]."""
    weights: Tensor
    """Weight of each image's loss, float32 [B]."""
    sample_seeds: Tensor
    """Seeds of whatever else is drawn for each image, such as dropout, int64 [B]."""
    conditioning: Conditioning | None
    """The encoded captions, where they are encoded once for all; otherwise None."""
    tokens: Tokens | None
    """The tokenized captions, where they are encoded in each step; otherwise None."""
    images: tuple[str, ...]
    """The images' file names, for messages."""
    share: float
    """B as a part of the images in the global micro-batch."""
    perturbation: Tensor | None = None
    """Noise that is to be mixed in besides, and not to be predicted, float32 [B, C, h, w]; None where there is none."""
    loss_mask: Tensor | None = None
    """How much the loss counts at each place, 0 to 1, float32 [B, 1, h, w]; None where no image has a mask."""

    @property
    def input_noise(self) -> Tensor:
        """All the noise to mix in, float32 [B, C, h, w]."""
        return self.noise if self.perturbation is None else self.noise + self.perturbation

    def masked(self, losses: Tensor) -> Tensor:
        """Losses [B, C, h, w] as far as they count; they are not scaled up to make up for what does not."""
        return losses if self.loss_mask is None else losses * self.loss_mask

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the batch, by name, in an order that depends on the names alone."""
        found: dict[str, Tensor] = {}
        for own in fields(Batch):
            value = getattr(self, own.name)
            if isinstance(value, Tensor):
                found[own.name] = value
            elif isinstance(value, Mapping):
                found |= {f"{own.name}.{key}": value[key] for key in sorted(value)}
        return found

    def scale_weights(self, share: float) -> Batch:
        """The batch with the weights of its images' losses multiplied by a share."""
        return evolve(self, weights=self.weights * share)

    def clone(self) -> Batch:
        """The batch in memory of its own."""
        return self._mapped(Tensor.clone)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; the copy from pinned memory does not wait."""
        # From other memory it may not: that could be in other use before a device such as mps has read it.
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> Batch:
        """The batch in memory from which CUDA copies without waiting."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, move: Callable[[Tensor], Tensor]) -> Batch:
        values = {own.name: getattr(self, own.name) for own in fields(Batch)}
        moved: dict[str, Any] = {name: move(value) for name, value in values.items() if isinstance(value, Tensor)}
        for name, value in values.items():
            if isinstance(value, Mapping):
                moved[name] = {key: move(tensor) for key, tensor in value.items()}
        return evolve(self, **moved)


@frozen(kw_only=True)
class BatchLoader:
    """Makes batches of planned shares from the cache."""

    datasets: Sequence[IndexedDataset]
    """The datasets that were planned."""
    cache: Cache
    """Where their latents and captions are."""
    seed: int
    """Seed of the run."""
    num_timesteps: int
    """Timesteps of the noise process."""
    latent_keys: LatentKeys
    """Where in the cache latents are."""
    captions: Captions
    """Where in the cache captions are, or what tokenizes them in each step."""
    total_steps: int
    """Steps of the run, of which `token_warmup_step` may be a share."""
    prior_loss_weight: float = 1.0
    """Weight of the loss of regularisation images."""
    loss: LossSection = field(factory=LossSection)
    """Which noise and which timesteps to draw."""
    live: OnlineEncoder | None = None
    """What encodes images that change from epoch to epoch; None where there are none."""

    def load(self, share: RankMicroBatch) -> Batch:
        """The batch of a share. Raises DataError where an image, or the cache, was damaged since it was looked at."""
        return self._batch(share, self._pictures(share))

    def batches(self, shares: Iterable[RankMicroBatch]) -> Iterator[Batch]:
        """The batches of shares, in order; images that change are decoded by threads, some shares ahead."""
        if self.live is None:
            yield from map(self.load, shares)
            return
        with ThreadPoolExecutor(self.live.workers) as pool:
            prepared = map_prefetch(pool, lambda share: (share, self._pictures(share)), shares, self.live.workers + 1)
            for share, pictures in prepared:
                yield self._batch(share, pictures)

    def _batch(self, share: RankMicroBatch, pictures: Sequence[Picture]) -> Batch:
        """The batch of a share; `pictures` has those of its images that change from epoch to epoch."""
        samples = self._samples(share)
        drawing = [partial(self._generator, example=example, when=when) for example, when in samples]
        entries = self._entries(samples, pictures)
        latents = [_drawn(entry, draw) for entry, draw in zip(entries, drawing, strict=True)]
        noise = [target_noise(image, self.loss, draw) for image, draw in zip(latents, drawing, strict=True)]
        use = CaptionContext(share.epoch, share.step, self.total_steps)
        conditioning, tokens = self._texts(
            [
                apply_caption_options(example.caption, example.subset, use, draw)
                for (example, _), draw in zip(samples, drawing, strict=True)
            ]
        )
        return Batch(
            latents=torch.stack(latents),
            noise=torch.stack(noise),
            timesteps=torch.tensor([self._timestep(draw("timestep")) for draw in drawing]),
            weights=torch.tensor([self.prior_loss_weight if own.subset.is_reg else 1.0 for own, _ in samples]),
            sample_seeds=torch.tensor([derived_seed(*self._key("dropout", *sample)) for sample in samples]),
            conditioning=conditioning,
            tokens=tokens,
            images=tuple(example.image.name for example, _ in samples),
            share=share.fraction,
            perturbation=self._perturbation(latents, drawing),
            loss_mask=_loss_mask(entries),
        )

    def _samples(self, share: RankMicroBatch) -> list[tuple[Example, tuple[int, int]]]:
        """The examples of a share, each with epoch and repeat."""
        return [
            (self.datasets[item.dataset].examples[item.example], (share.epoch, item.repeat)) for item in share.items
        ]

    def _pictures(self, share: RankMicroBatch) -> list[Picture]:
        """Those images of a share that change from epoch to epoch, as they are this once."""
        return [
            augmented_picture(example, partial(self._generator, example=example, when=when))
            for example, when in self._samples(share)
            if example.is_augmented
        ]

    def _entries(
        self, samples: Sequence[tuple[Example, tuple[int, int]]], pictures: Sequence[Picture]
    ) -> list[Mapping[str, Tensor]]:
        """The distribution of each image's latents, and its mask where it has one: made now, or from the cache."""
        made = iter(self.live.entries(pictures) if self.live else ())
        return [next(made) if own.is_augmented else self._cached(own, when) for own, when in samples]

    def _timestep(self, generator: np.random.Generator) -> int:
        """A timestep, all that are allowed equally likely."""
        return int(generator.integers(self.loss.min_timestep or 0, self.loss.max_timestep or self.num_timesteps))

    def _perturbation(self, latents: Sequence[Tensor], drawing: Sequence[RngFactory]) -> Tensor | None:
        if self.loss.ip_noise_gamma is None:
            return None
        pairs = zip(latents, drawing, strict=True)
        return torch.stack([perturbation(image.shape, self.loss, draw("perturbation")) for image, draw in pairs])

    def _cached(self, example: Example, when: tuple[int, int]) -> Mapping[str, Tensor]:
        """What the cache holds of an image, of its mirror image if that is to be used."""
        mirrored = is_mirrored(example, partial(self._generator, example=example, when=when))
        return self.cache.load(self.latent_keys[example.sample_id, mirrored], names=("mean", "std"))

    def _texts(self, texts: Sequence[str]) -> tuple[Conditioning | None, Tokens | None]:
        if not isinstance(self.captions, Mapping):
            return None, self.captions(texts)
        return self.cache.load_stacked([self.captions[text] for text in texts]), None

    def _key(self, purpose: str, example: Example, when: tuple[int, int]) -> tuple[int | str, ...]:
        epoch, repeat = when
        return self.seed, purpose, epoch, example.sample_id, repeat

    def _generator(self, purpose: str, example: Example, when: tuple[int, int]) -> np.random.Generator:
        return keyed_generator(*self._key(purpose, example, when))


def _drawn(entry: Mapping[str, Tensor], draw: RngFactory) -> Tensor:
    """A draw from the distribution of an image's latents, [C, h, w]."""
    mean, std = entry["mean"].float(), entry["std"].float()
    return mean + std * normal(draw("posterior"), mean.shape)


def _loss_mask(entries: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    """The masks of a batch; where only some images have one, the others' loss counts everywhere."""
    if not any("mask" in entry for entry in entries):
        return None
    return torch.stack([entry.get("mask", torch.ones_like(entry["mean"][:1])) for entry in entries])


def prefetch(batches: Iterable[Batch], depth: int, device: torch.device | None = None) -> Generator[Batch]:
    """The batches, up to `depth` of them made ahead in a background thread; pinned if the device is a CUDA one.

    What goes wrong in the thread is raised here. The thread ends with the batches, or when the
    consumer stops early.
    """
    iterator = iter(batches)
    pin = device is not None and device.type == "cuda"

    def make() -> Batch | None:
        batch = next(iterator, None)
        return batch.pin_memory() if pin and batch is not None else batch

    if depth == 0:
        while (batch := make()) is not None:
            yield batch
        return
    with ThreadPoolExecutor(1, "prefetch", _use_device, (device,)) as pool:
        waiting: deque[Future[Batch | None]] = deque(pool.submit(make) for _ in range(depth))
        try:
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(make))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)


def _use_device(device: torch.device | None) -> None:
    """Keep a thread from opening a second CUDA device: pinning memory uses the thread's current one."""
    if device is not None and device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
