"""Dropout masks that are a function of the image's seed, the adapter and the position, not of a generator's state.

So a mask is the same when gradient checkpointing computes a layer again, on any device, and however a
batch is split over processes. The function is SplitMix64 (Steele, Lea and Flood, 2014): number i of
the stream that starts at a seed is mix(seed + i·γ).

Shapes: A adapters, B images in a micro-batch, L positions, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import field, frozen
from attrs import validators as v
from torch import Tensor

from lorakit.utils.rng import derived_seed

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_FIRST_NEURON = 2**32

_rate = field(default=0.0, validator=[v.ge(0), v.lt(1)])


@frozen(kw_only=True)
class DropoutRates:
    """How often each kind of dropout strikes while training."""

    neuron: float = _rate
    """Share of the rank-r activations that are dropped, each for itself; the others are scaled up to make up for it."""
    rank: float = _rate
    """Share of the ranks that are dropped, for each image; the others are scaled up to make up for it."""
    module: float = _rate
    """Share of the adapters that are left out, for each image; the others stay as they are."""

    def __bool__(self) -> bool:
        return bool(self.neuron or self.rank or self.module)


class AdapterDropout:
    """The dropout masks of one adapter, for one micro-batch after another.

    It holds its own tensors rather than its number, for which torch.compile would compile each adapter separately.
    """

    def __init__(self, rate: float) -> None:
        """Masks that drop this share of the rank-r activations, beside what `begin_batch` says."""
        self._rate = rate
        self._stream: Tensor | None = None
        self._gamma: Tensor | None = None
        self._factors: Tensor | None = None
        self._kept: Tensor | None = None

    def begin_batch(self, stream: Tensor, gamma: Tensor, factors: Tensor | None, kept: Tensor | None = None) -> None:
        """Make the masks from streams [B] with step γ from now on.

        Factors [B, 1, rank] are for whole images; `kept` [B] says which images the adapter is not left out for.
        """
        self._stream, self._gamma, self._factors, self._kept = stream, gamma, factors, kept

    def mask(self, hidden: Tensor) -> Tensor:
        """What to multiply the rank-r activations [n·B, L, r] by; an image's n rows follow one another."""
        if self._stream is None or self._gamma is None:
            raise RuntimeError("Network.begin_batch must get the samples' seeds before the forward pass")
        rows, _, rank = hidden.shape
        images = len(self._stream)
        if rows % images:
            raise ValueError(f"an adapter got {rows} rows, but the micro-batch has {images} images")
        if self._factors is None:
            return self._neurons(self._stream, self._gamma, hidden)
        factors = self._factors[..., :rank].to(hidden.dtype)
        if rows > images:
            factors = factors.repeat_interleave(rows // images, dim=0)
        return factors * self._neurons(self._stream, self._gamma, hidden) if self._rate else factors

    def kept(self, rows: int) -> Tensor:
        """Which of n·B rows are of images that the adapter is not left out for, bool [n·B]."""
        if self._kept is None:
            raise RuntimeError("Network.begin_batch must get the samples' seeds before the forward pass")
        images = len(self._kept)
        return self._kept.repeat_interleave(rows // images) if rows > images else self._kept

    def _neurons(self, stream: Tensor, gamma: Tensor, hidden: Tensor) -> Tensor:
        places = torch.arange(_FIRST_NEURON, _FIRST_NEURON + hidden.numel() // len(stream), device=stream.device)
        kept = _keep_mask(_numbers(stream, gamma, places), self._rate)
        return kept.view(hidden.shape).to(hidden.dtype).div_(1 - self._rate)


class NetworkDropout:
    """The dropout masks of all adapters of a network, for one micro-batch after another."""

    def __init__(self, rates: DropoutRates, keys: Sequence[str], rank: int) -> None:
        """Masks for the adapters of these keys, of at most this rank."""
        self.adapters = [AdapterDropout(rates.neuron) for _ in keys]
        """Those of each adapter."""
        self.rates = rates
        self._rank = rank
        self._salts = torch.tensor([derived_seed("dropout", key) for key in keys])  # [A]
        # A tensor, because as a constant it overflows inductor's arithmetic of indices.
        self._gamma = torch.tensor(_GOLDEN_GAMMA)

    def begin_batch(self, sample_seeds: Tensor) -> None:
        """Make the masks of B images from now on; their seeds are int64 [B]."""
        device = sample_seeds.device
        self._salts, self._gamma = self._salts.to(device), self._gamma.to(device)
        streams = _mix(self._salts[:, None] ^ sample_seeds)  # [A, B]
        factors: Sequence[Tensor | None] = [None] * len(streams)
        kept: Sequence[Tensor | None] = factors
        if self.rates.rank or self.rates.module:
            places = torch.arange(1 + self._rank, device=device)
            numbers = _numbers(streams, self._gamma, places)  # [A, B, 1 + rank]
            module, ranks = numbers[:, :, :1], numbers[:, :, 1:]
            survivors = _keep_mask(module, self.rates.module)
            surviving_ranks = survivors & _keep_mask(ranks, self.rates.rank)
            factors = (surviving_ranks.float() / (1 - self.rates.rank)).unsqueeze(2).unbind()  # A of [B, 1, rank]
            kept = survivors.squeeze(2).unbind()  # A of [B]
        for adapter, stream, own, own_kept in zip(self.adapters, streams.unbind(), factors, kept, strict=True):
            adapter.begin_batch(stream, self._gamma, own, own_kept)


def _numbers(streams: Tensor, gamma: Tensor, places: Tensor) -> Tensor:
    """The numbers at `places` [n] of streams [...] with step γ: uniform int64 [..., n]."""
    return _mix(streams.unsqueeze(-1) + places * gamma)


def _keep_mask(numbers: Tensor, rate: float) -> Tensor:
    """True for the share 1 - rate of uniform int64 numbers."""
    return numbers >= int(rate * 2**64) - 2**63


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output function, in place, on int64 taken as unsigned."""
    for shift, multiplier in _ROUNDS:
        z.bitwise_xor_(_shifted(z, shift)).mul_(multiplier)
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, shift: int) -> Tensor:
    return (z >> shift).bitwise_and_(2 ** (64 - shift) - 1)
