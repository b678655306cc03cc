"""Batches: what the training loop computes a loss of, made ready ahead of time in the background.

Every number drawn for an image depends on the seed, the epoch, the image and which of its repeats it
is, and on nothing else. Shapes: B images in a micro-batch, C latent channels, h and w latent sides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from attrs import evolve, field, fields, frozen
from torch import Tensor

from lorakit.config.loss import LossSection
from lorakit.data.cache import Cache
from lorakit.data.captions import CaptionUse, caption_in_use
from lorakit.data.encoding import CaptionKeys, LatentKeys
from lorakit.data.examples import Example, IndexedDataset
from lorakit.data.noise import normal, perturbation, target_noise
from lorakit.data.planning import Share
from lorakit.models.protocol import Conditioning, Tokens
from lorakit.randomness import Generators, derived_seed, keyed_generator


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

    @property
    def input_noise(self) -> Tensor:
        """All the noise to mix in, float32 [B, C, h, w]."""
        return self.noise if self.perturbation is None else self.noise + self.perturbation

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; the copy from pinned memory does not wait."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

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
    captions: CaptionKeys | Callable[[Sequence[str]], Tokens]
    """Where in the cache captions are; or the text encoder's `tokenize`, if they are encoded in each step."""
    total_steps: int
    """Steps of the run, of which `token_warmup_step` may be a share."""
    prior_loss_weight: float = 1.0
    """Weight of the loss of regularisation images."""
    loss: LossSection = field(factory=LossSection)
    """Which noise and which timesteps to draw."""

    def load(self, share: Share) -> Batch:
        """The batch of a share. Raises DataError where the cache was damaged since it was filled."""
        samples = [
            (self.datasets[item.dataset].examples[item.example], (share.epoch, item.repeat)) for item in share.items
        ]
        latents = [self._latents(example, when) for example, when in samples]
        drawing = [partial(self._generator, example=example, when=when) for example, when in samples]
        noise = [target_noise(image, self.loss, draw) for image, draw in zip(latents, drawing, strict=True)]
        use = CaptionUse(share.epoch, share.step, self.total_steps)
        conditioning, tokens = self._texts(
            [
                caption_in_use(example.caption, example.subset, use, draw)
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
        )

    def _timestep(self, generator: np.random.Generator) -> int:
        """A timestep, all that are allowed equally likely."""
        return int(generator.integers(self.loss.min_timestep or 0, self.loss.max_timestep or self.num_timesteps))

    def _perturbation(self, latents: Sequence[Tensor], drawing: Sequence[Generators]) -> Tensor | None:
        if self.loss.ip_noise_gamma is None:
            return None
        pairs = zip(latents, drawing, strict=True)
        return torch.stack([perturbation(image.shape, self.loss, draw("perturbation")) for image, draw in pairs])

    def _latents(self, example: Example, when: tuple[int, int]) -> Tensor:
        """A draw from the distribution of the image's latents, mirrored in half of all cases if it is to be."""
        mirrored = example.subset.flip_aug and bool(self._generator("flip", example, when).integers(2))
        posterior = self.cache.load(self.latent_keys[example.identity, mirrored])
        mean, std = posterior["mean"].float(), posterior["std"].float()
        return mean + std * normal(self._generator("posterior", example, when), mean.shape)

    def _texts(self, texts: Sequence[str]) -> tuple[Conditioning | None, Tokens | None]:
        if not isinstance(self.captions, Mapping):
            return None, self.captions(texts)
        entries = [self.cache.load(self.captions[text]) for text in texts]
        return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}, None

    def _key(self, purpose: str, example: Example, when: tuple[int, int]) -> tuple[int | str, ...]:
        epoch, repeat = when
        return self.seed, purpose, epoch, example.identity, repeat

    def _generator(self, purpose: str, example: Example, when: tuple[int, int]) -> np.random.Generator:
        return keyed_generator(*self._key(purpose, example, when))


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
