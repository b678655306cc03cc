"""A base model small enough for tests: real torch modules with random weights that never change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn


class TinyVaeEncoder(nn.Module):
    """Mean and standard deviation of four latent channels, of patches of 8x8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, kernel_size=8, stride=8)
        self.batch_sizes: list[int] = []
        self.overflows_on = -1

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Infinite for the image with the number `overflows_on`."""
        mean, log_std = self.patches(images).chunk(2, dim=1)
        numbers = torch.arange(len(images)) + sum(self.batch_sizes)
        mean = mean.masked_fill((numbers == self.overflows_on)[:, None, None, None], torch.inf)
        self.batch_sizes.append(len(images))
        return mean, log_std.tanh().exp()


class TinyTextEncoder(nn.Module):
    """Conditioning of captions, one chunk of their UTF-8 bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 6)
        self.batch_sizes: list[int] = []

    def tokenize(self, captions: Sequence[str], weighted: bool = False) -> dict[str, Tensor]:
        """The captions' bytes; where they are weighted, those of captions without round brackets."""
        plain = [caption.translate({ord("("): None, ord(")"): None}) for caption in captions] if weighted else captions
        rows = [list(caption.encode()[:77].ljust(77, b"\0")) for caption in plain]
        return {"ids": torch.tensor(rows, dtype=torch.int64).unsqueeze(1)}

    def encode(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Hidden states and their mean."""
        self.batch_sizes.append(len(tokens["ids"]))
        hidden = self.embedding(tokens["ids"].flatten(1))
        return {"hidden_states": hidden, "pooled": hidden.mean(dim=1)}


class TinyModel:
    """A base model that notes which of its parts were asked for."""

    def __init__(self, version: str = "1") -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._vae_encoder = TinyVaeEncoder()
            self._text_encoder = TinyTextEncoder()
        self.version = version
        self.touched: set[str] = set()

    def fingerprint(self, part: Literal["vae_encoder", "text_encoder"], memo: object = None) -> str:  # noqa: ARG002
        """The part's name and the model's version."""
        return f"{part}-{self.version}"

    @property
    def vae_encoder(self) -> TinyVaeEncoder:
        """The image encoder."""
        self.touched.add("vae_encoder")
        return self._vae_encoder

    @property
    def text_encoder(self) -> TinyTextEncoder:
        """The text encoder."""
        self.touched.add("text_encoder")
        return self._text_encoder
