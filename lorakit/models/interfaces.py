"""What training needs of a base model, whatever its family.

Shapes: B images in a micro-batch, C latent channels, h and w latent sides, H and W image sides in
pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

from attrs import frozen
from torch import Tensor, nn

from lorakit.api.block_layout import BlockLayout
from lorakit.api.lora_layout import LoRALayout
from lorakit.diffusion.process import NoiseProcess
from lorakit.models.weights.folders import TensorSlice

Conditioning = Mapping[str, Tensor]
"""Inputs of the denoiser for each image besides latents and timestep, by name; every tensor's first side is B."""

Tokens = Mapping[str, Tensor]
"""Inputs of a text encoder for each caption, by name; every tensor's first side is B."""

EncoderName = Literal["vae_encoder", "text_encoder"]
"""What encodes images or captions once, before a run trains, as models of all families call it."""


@frozen
class AdaptationTarget:
    """A layer of the base model that a network may adapt."""

    key: str
    """Its name in LoRA files of sd-scripts, which lorakit writes: `lora_unet_down_blocks_0_attentions_0_proj_in`."""
    part: str
    """Name of the model's part that it belongs to: `unet`."""
    root: nn.Module
    """The module of the whole part."""
    path: str
    """Its dotted path in the root: `down_blocks.0.attentions.0.proj_in`."""
    tags: frozenset[str] = frozenset()
    """What kind of layer it is, for networks to choose by: `transformer`, `attention`, `mlp`, `resnet`, `sampler`,
    `conv3x3`, `text_encoder`, or a family's own words."""
    block_index: int | None = None
    """Number of its block, as `layout` counts them; None where blocks are not numbered."""
    layout: BlockLayout | None = None
    """How the blocks of its part are numbered; None where they are not."""
    encoder_index: int | None = None
    """Number of its text encoder, counted from 0 over the model; None in the denoiser."""
    diffusers_path: str = ""
    """Its path in a pipeline of diffusers, `unet.down_blocks.0.attentions.0.proj_in`; empty if it has none."""
    original_path: str = ""
    """Its dotted path in the original code, `diffusion_model.input_blocks.1.1.proj_in`, where LoRA files of some tools
    use it; empty if none does."""
    other_keys: tuple[str, ...] = ()
    """Other keys that it has in LoRA files of some tools."""
    shared_input: str = ""
    """Name of the tensor that it reads, the same for all layers of its part that read it, such as those of queries and
    keys; one operation may compute them. Empty if it has its input for itself."""
    shares_within: str = ""
    """Path of the module whose layers one operation may compute together; empty for all of the part."""
    is_read: bool = True
    """Whether its output has an effect on the model's; adapters of layers for which it has none are not trained."""
    fused_in: TensorSlice | None = None
    """Where some LoRA files have it as rows of a larger layer, such as queries, keys and values in one: that layer's
    key or dotted path, and the rows."""
    fused_from: tuple[TensorSlice, ...] = ()
    """Where diffusers has several layers that are its rows: the path of each in a pipeline, and the rows."""

    @property
    def names(self) -> tuple[str, ...]:
        """All that LoRA files may call the layer: its keys and the dotted paths."""
        names = (self.key, self.diffusers_path, self.original_path, *self.other_keys)
        return tuple(dict.fromkeys(filter(None, names)))

    def name_in(self, layout: LoRALayout) -> str:
        """What LoRA files in a layout call it; empty if it has no name there."""
        return {"kohya": self.key, "original": self.original_path, "diffusers": self.diffusers_path}[layout]

    @property
    def parent(self) -> nn.Module:
        """The module that holds it."""
        return self.root.get_submodule(self.path.rpartition(".")[0])

    @property
    def module(self) -> nn.Module:
        """The layer as it is now: the base layer, or what replaced it."""
        return self.root.get_submodule(self.path)

    def replace(self, module: nn.Module) -> None:
        """Put another module in the layer's place."""
        setattr(self.parent, self.path.rpartition(".")[2], module)


class AttentionBackend(Protocol):
    """A way to compute attention."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, /) -> Tensor:
        """softmax(q·kᵀ/√d)·v; query, key, value and result are [B, heads, tokens, d].

        Scores q·kᵀ/√d must be computed in float32 where the number format is shorter: some models overflow float16.
        `mask` is bool, [B, 1, 1, tokens of the key], and false for keys that get no weight, such as a caption's
        padding; each image has at least one that does. It is None where all do.
        """


class VaeEncoder(Protocol):
    """Turns images into the distribution of their latents."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of scaled latents, float32 [B, C, h, w], of images [B, 3, H, W] in [-1, 1]."""


class VaeDecoder(Protocol):
    """Turns latents into images."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images, float32 [B, 3, H, W] in [-1, 1], of scaled latents [B, C, h, w]."""


class TextEncoder(Protocol):
    """Turns captions into conditioning."""

    def tokenize(self, captions: Sequence[str], weighted: bool = False) -> Tokens:
        """The captions as `encode` takes them, on the CPU; truncated to the model's longest length.

        With `weighted`, brackets weight the words in them (`lorakit.models.prompt_weights`).
        """

    def encode(self, tokens: Tokens) -> Conditioning:
        """Conditioning of tokenized captions; differentiable with respect to the encoder's adapters."""


class Memo(Protocol):
    """A cache of what was computed from files."""

    def get_or_compute(self, path: Path, name: str, compute: Callable[[], str]) -> str:
        """What `compute` returns, computed once per name for as long as the file's size and time stay the same."""


class DiffusionModel(Protocol):
    """A base model whose parts are read on first use and can be freed one by one; `lorakit.models.base` has a base."""

    noise: NoiseProcess

    def fingerprint(self, part: EncoderName, memo: Memo = ...) -> str:
        """A short key of all that the encoder's output depends on, from weights to settings.

        Hashes of files are cached in `memo`, or until the process ends.
        """

    @property
    def vae_encoder(self) -> VaeEncoder:
        """The image encoder, read on first use."""

    @property
    def vae_decoder(self) -> VaeDecoder:
        """The image decoder, read on first use."""

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder, read on first use."""

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser, read on first use, frozen."""

    def free(self, part: EncoderName | Literal["vae_decoder"]) -> None:
        """Free an encoder or decoder; it is read again on the next use."""

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Shape [C, h, w] of the latents of an image of that size in pixels; reads no weights."""

    def targets(self, parts: Sequence[str]) -> list[AdaptationTarget]:
        """The layers of these parts that can be adapted, in a fixed order: text encoders first, then the denoiser."""

    def empty_targets(self, parts: Sequence[str]) -> list[AdaptationTarget]:
        """The same layers in the same order, in modules without memory (device `meta`); reads no weights."""

    def use_attention(self, backend: AttentionBackend) -> None:
        """Compute the denoiser's attention with this backend."""

    def quantize(self, formats: Mapping[str, str]) -> None:
        """Quantize the weights of the adaptable layers of some parts; other parts are not quantized from now on.

        `formats` maps parts to names in `lorakit.models.memory.weight_formats.FORMATS`.
        """

    def compile(self, backend: str | None) -> None:
        """Compile the denoiser's blocks, with the adapters in them, with a backend of torch.compile; None undoes it."""

    def use_channels_last(self, on: bool) -> None:
        """Use channels-last memory format in the denoiser, or the default one; results differ by rounding only."""

    def stream(self, parts: Sequence[str]) -> None:
        """Keep the weights of the adaptable layers of these parts in CPU RAM (block swap).

        They are copied to the device ahead of their use, quantized where `quantize` asks for it.
        """

    def enable_gradient_checkpointing(self, share: float = 1.0) -> None:
        """Recompute activations in the backward pass instead of keeping them (non-reentrant).

        With a share below 1, only in that share of the denoiser's blocks, those that keep the most.
        """

    def metadata(self, memo: Memo = ...) -> Mapping[str, str]:
        """Metadata of LoRA files about their base model, such as `modelspec.architecture`.

        Hashes of files are cached in `memo`, or until the process ends.
        """

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output for noisy latents [B, C, h, w] at timesteps [B]: [B, C, h, w]."""
