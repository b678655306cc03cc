"""Batches, loaded ahead of time in the background.

Every number drawn for an image depends on the seed, the epoch, the image and which of its repeats it
is, and on nothing else. Shapes: B images in a micro-batch, C latent channels, h and w latent sides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from attrs import evolve, fields, frozen
from torch import Tensor

from lorakit.api.loss import LossConfig
from lorakit.data.batch_sampler import RankMicroBatch
from lorakit.data.cache.encode import LatentKeys
from lorakit.data.cache.parallel import map_prefetch
from lorakit.data.cache.store import Cache
from lorakit.data.cache.vae import OnlineEncoder
from lorakit.data.captions import CaptionContext, apply_caption_options
from lorakit.data.images.augmentation import Picture, augmented_picture, crop_of, is_mirrored
from lorakit.data.index import Example, IndexedDataset
from lorakit.diffusion.noise import normal, perturbation, target_noise
from lorakit.diffusion.process import TimestepSampler
from lorakit.errors import DataError, Problem
from lorakit.models.conditioning import ImageSizes
from lorakit.models.interfaces import Conditioning, Tokens
from lorakit.utils.rng import derived_seed, keyed_generator


@frozen(eq=False)
class Batch:
    """The images of one micro-batch, or one process's part of them."""

    latents: Tensor
    """Latents drawn from the image encoder's distribution, float32 [B, C, h, w]."""
    noise: Tensor
    """Noise to mix in and to predict, float32 [B, C, h, w]."""
    timesteps: Tensor
    """How much of the noise is mixed in, as the noise process counts: int64 or float32 [B]."""
    weights: Tensor
    """Weight of each image's loss, float32 [B]."""
    sample_seeds: Tensor
    """Seeds of other draws for each image, such as dropout, int64 [B]."""
    conditioning: Conditioning | None
    """The encoded captions, if they are encoded before training; else None."""
    tokens: Tokens | None
    """The tokenized captions, if they are encoded in each step; else None."""
    images: tuple[str, ...]
    """The images' file names, for messages."""
    share: float
    """B as a part of the images in the global micro-batch."""
    perturbation: Tensor | None = None
    """Additional noise in the input that is not in the target, float32 [B, C, h, w]; None if absent."""
    loss_mask: Tensor | None = None
    """Weight of the loss at each place, 0 to 1, float32 [B, 1, h, w]; None if no image has a mask."""
    image_conditioning: Conditioning | None = None
    """What the denoiser takes of the images' sizes, [B, …]; None for a model that takes nothing."""

    @property
    def input_noise(self) -> Tensor:
        """All the noise to mix in, float32 [B, C, h, w]."""
        return self.noise if self.perturbation is None else self.noise + self.perturbation

    def masked(self, losses: Tensor) -> Tensor:
        """Losses [B, C, h, w] times the loss mask; what is left is not scaled up."""
        return losses if self.loss_mask is None else losses * self.loss_mask

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the batch, by name, in an order that depends on the names alone."""
        found: dict[str, Tensor] = {}
        for field in fields(Batch):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found[field.name] = value
            elif isinstance(value, Mapping):
                found |= {f"{field.name}.{key}": value[key] for key in sorted(value)}
        return found

    def scale_weights(self, share: float) -> Batch:
        """The batch with the weights of its images' losses multiplied by a share."""
        return evolve(self, weights=self.weights * share)

    def clone(self) -> Batch:
        """A copy of the batch."""
        return self._mapped(Tensor.clone)

    def resized(self, shape: Sequence[int]) -> Batch:
        """A batch like this with latents of another shape, [B, C, h, w]; of zeros, and of this one's first image."""
        images, _, height, width = shape
        repeated = self._mapped(lambda tensor: tensor[:1].expand(images, *tensor.shape[1:]).contiguous())
        sized = {
            name: tensor.new_zeros(images, tensor.shape[1], height, width)
            for name in ("latents", "noise", "perturbation", "loss_mask")
            if (tensor := getattr(self, name)) is not None
        }
        return evolve(repeated, images=self.images[:1] * images, **sized)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; the copy from pinned memory does not wait."""
        # From other memory it may not: that could be in other use before a device such as mps has read it.
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> Batch:
        """The batch in memory from which CUDA copies without waiting."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, move: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(Batch)}
        moved: dict[str, Any] = {name: move(value) for name, value in values.items() if isinstance(value, Tensor)}
        for name, value in values.items():
            if isinstance(value, Mapping):
                moved[name] = {key: move(tensor) for key, tensor in value.items()}
        return evolve(self, **moved)


@frozen
class CachedPrompts:
    """Captions that were encoded before training."""

    cache: Cache
    """Where they are."""
    keys: Mapping[str, str]
    """The key of each caption in the cache."""
    collate: Callable[[Sequence[Conditioning]], Conditioning]
    """Puts captions together as one batch."""

    def load(self, texts: Sequence[str]) -> tuple[Conditioning, None]:
        """The conditioning of captions, [B, …]. Raises DataError where one is not in the cache, or was damaged."""
        missing = [text for text in texts if text not in self.keys]
        if missing:
            message = "was not encoded before training, so no batch can have it"
            raise DataError(str(Problem(f"caption {missing[0]!r}", message, "this is a bug in lorakit; report it")))
        keys = [self.keys[text] for text in texts]
        entries = [self.cache.load(key) for key in keys]
        try:
            return self.collate(entries), None
        except (KeyError, RuntimeError) as error:
            files = ", ".join(str(self.cache.path(key)) for key in dict.fromkeys(keys))
            raise DataError(str(Problem(files, f"do not fit together: {error}", "remove these files"))) from error


@frozen
class LivePrompts:
    """Captions that are encoded in each step."""

    tokenize: Callable[[Sequence[str]], Tokens]
    """The text encoder's `tokenize`."""

    def load(self, texts: Sequence[str]) -> tuple[None, Tokens]:
        """The tokens of captions, [B, …]."""
        return None, self.tokenize(texts)


Prompts = CachedPrompts | LivePrompts
"""Captions as batches hold them."""


@frozen
class Sample:
    """One appearance of an image; every draw for it is keyed by seed, purpose, epoch, image and repeat."""

    example: Example
    seed: int
    """Seed of the run."""
    epoch: int
    """Number of the epoch."""
    repeat: int
    """Which of the image's appearances in the epoch it is, from 0."""

    def key(self, purpose: str) -> tuple[int | str, ...]:
        """All that a draw for one purpose depends on."""
        return self.seed, purpose, self.epoch, self.example.sample_id, self.repeat

    def draw(self, purpose: str) -> np.random.Generator:
        """The fresh generator for one purpose."""
        return keyed_generator(*self.key(purpose))

    @property
    def sizes(self) -> ImageSizes:
        """How the image is made from its file this once."""
        crop = crop_of(self.example, self.draw)
        left, top = crop.crop_xy
        if is_mirrored(self.example, self.draw):
            left = crop.resized[0] - crop.bucket[0] - left
        return ImageSizes(self.example.size, (left, top), crop.bucket)


@frozen(kw_only=True)
class BatchLoader:
    """Makes batches of planned shares from the cache."""

    datasets: Sequence[IndexedDataset]
    """The datasets that were planned."""
    cache: Cache
    """Where their latents are."""
    seed: int
    """Seed of the run."""
    timestep_sampler: TimestepSampler
    """Draws the timestep of each image."""
    latent_keys: LatentKeys
    """Where in the cache latents are."""
    captions: Prompts
    """What gives the captions of a batch, encoded or tokenized."""
    total_steps: int
    """Steps of the run, of which `token_warmup_step` may be a share."""
    loss: LossConfig
    """Which noise to draw."""
    prior_loss_weight: float = 1.0
    """Weight of the loss of regularisation images."""
    live: OnlineEncoder | None = None
    """Encodes images that change from epoch to epoch; None if there are none."""
    image_conditioning: Callable[[Sequence[ImageSizes]], Conditioning] | None = None
    """Gives what the denoiser takes of the sizes of images; None for a model that takes nothing."""

    def load(self, share: RankMicroBatch) -> Batch:
        """The batch of a share. Raises DataError where an image or the cache was damaged since it was checked."""
        return self._batch(*self._prepared(share))

    def batches(self, shares: Iterable[RankMicroBatch]) -> Iterator[Batch]:
        """The batches of shares, in order; images that change are decoded by threads, some shares ahead."""
        if self.live is None:
            yield from map(self.load, shares)
            return
        with ThreadPoolExecutor(self.live.workers) as pool:
            for prepared in map_prefetch(pool, self._prepared, shares, self.live.workers + 1):
                yield self._batch(*prepared)

    def _batch(self, share: RankMicroBatch, samples: Sequence[Sample], pictures: Sequence[Picture]) -> Batch:
        """The batch of a share; `pictures` has those of its images that change from epoch to epoch."""
        encoded = iter(self.live.entries(pictures) if self.live else ())
        entries = [self._entry(sample, encoded) for sample in samples]
        latents, noise, perturbations, timesteps, texts = [], [], [], [], []
        context = CaptionContext(share.epoch, share.step, self.total_steps)
        for entry, sample in zip(entries, samples, strict=True):
            # A draw from the distribution of the image's latents, [C, h, w].
            mean, std = entry["mean"].float(), entry["std"].float()
            image = mean + std * normal(sample.draw("posterior"), mean.shape)
            latents.append(image)
            noise.append(target_noise(image, self.loss, sample.draw))
            timesteps.append(self.timestep_sampler(sample.draw("timestep"), image.shape))
            if self.loss.ip_noise_gamma is not None:
                perturbations.append(perturbation(image.shape, self.loss, sample.draw("perturbation")))
            example = sample.example
            texts.append(apply_caption_options(example.caption, example.subset, context, sample.draw))
        conditioning, tokens = self.captions.load(texts)
        weights = [self.prior_loss_weight if sample.example.subset.is_reg else 1.0 for sample in samples]
        # Where only some images have a mask, the others' loss counts everywhere.
        has_masks = any("mask" in entry for entry in entries)
        masks = [entry.get("mask", torch.ones_like(entry["mean"][:1])) for entry in entries] if has_masks else []
        return Batch(
            latents=torch.stack(latents),
            noise=torch.stack(noise),
            timesteps=torch.tensor(timesteps),
            weights=torch.tensor(weights),
            sample_seeds=torch.tensor([derived_seed(*sample.key("dropout")) for sample in samples]),
            conditioning=conditioning,
            tokens=tokens,
            images=tuple(sample.example.image.name for sample in samples),
            share=share.fraction,
            perturbation=torch.stack(perturbations) if perturbations else None,
            loss_mask=torch.stack(masks) if has_masks else None,
            image_conditioning=self.image_conditioning and self.image_conditioning([own.sizes for own in samples]),
        )

    def _prepared(self, share: RankMicroBatch) -> tuple[RankMicroBatch, list[Sample], list[Picture]]:
        """A share with its images, and those of them that change from epoch to epoch, decoded."""
        samples = [
            Sample(self.datasets[item.dataset].examples[item.example], self.seed, share.epoch, item.repeat)
            for item in share.items
        ]
        changing = (sample for sample in samples if sample.example.is_augmented)
        return share, samples, [augmented_picture(sample.example, sample.draw) for sample in changing]

    def _entry(self, sample: Sample, encoded: Iterator[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The latents of an image: the next one encoded, or the cache's entry of the image or its mirror image."""
        if sample.example.is_augmented:
            return next(encoded)
        key = self.latent_keys[sample.example.sample_id, is_mirrored(sample.example, sample.draw)]
        return self.cache.load(key, names=("mean", "std"))


def prefetch(batches: Iterable[Batch], depth: int, device: torch.device | None = None) -> Generator[Batch]:
    """The batches, up to `depth` of them made ahead in a background thread; pinned if the device is a CUDA one.

    Errors in the thread are raised here. The thread ends with the batches, or when the consumer
    stops early.
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

    def use_device() -> None:
        # Pinning memory uses the thread's current CUDA device, which would be a second one.
        if device is not None and device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)

    with ThreadPoolExecutor(1, "prefetch", use_device) as pool:
        waiting: deque[Future[Batch | None]] = deque(pool.submit(make) for _ in range(depth))
        try:
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(make))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)
