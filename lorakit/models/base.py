"""What base models of all families have in common: a family derives from `BaseModel` and says what is its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn

from lorakit.api.components import ModelPart
from lorakit.checkpoints import HubModel
from lorakit.diffusion.process import NoiseProcess
from lorakit.models.interfaces import (
    AdaptationTarget,
    AttentionBackend,
    Conditioning,
    EncoderName,
    Memo,
    TextEncoder,
    VaeDecoder,
    VaeEncoder,
)
from lorakit.models.memory.activation_checkpointing import checkpoint_blocks, checkpointed_blocks
from lorakit.models.memory.block_swap import stream
from lorakit.models.memory.channels_last import use_channels_last
from lorakit.models.memory.compile import compile_blocks
from lorakit.models.memory.quantization import quantize
from lorakit.models.vae import read_vae_decoder, read_vae_encoder
from lorakit.models.weights.checkpoint import CheckpointPart, ModelCheckpoint
from lorakit.models.weights.hashing import ProcessMemo, hash_of_file, hash_of_weights, short_hash_of_file
from lorakit.models.weights.merge_lora import Merging
from lorakit.models.weights.modules import empty_module, read_module
from lorakit.models.weights.training_adapter import taken_back

PROCESS_MEMO = ProcessMemo()
"""Caches hashes of files until the process ends."""
NOTHING_MERGED = Merging(())
"""No LoRA files to merge."""


@frozen(kw_only=True)
class PartModule:
    """How a part that adapters can be for is built, and how it is treated in memory."""

    part: ModelPart
    """The part."""
    build: Callable[[CheckpointPart], nn.Module]
    """Its module, with the settings that were stored, weights of any value; called on the meta device."""
    targets: Callable[[nn.Module], Iterable[AdaptationTarget]]
    """The layers of the module that can be adapted, in a fixed order."""
    key: Callable[[str], str]
    """What LoRA files call a layer, by its path in the module."""
    finish: Callable[[nn.Module, CheckpointPart, torch.device], None] = lambda _module, _part, _device: None
    """Sets what the module needs besides its stored weights, once these are read."""
    compiled: tuple[type[nn.Module], ...] = ()
    """The kinds of blocks that torch.compile compiles."""
    checkpoint: Callable[[nn.Module, float], None] = lambda module, share: checkpoint_blocks(
        checkpointed_blocks(module), share
    )
    """Lets a share of the blocks recompute activations in the backward pass; by default of each `CheckpointedBlock`."""
    block_path: re.Pattern[str] = field(default=re.compile(r".*?\.\d+"))
    """Matches the part of a layer's path up to the block that is swapped between host and device as one."""

    def blocks(self, module: nn.Module) -> list[list[nn.Module]]:
        """The layers that can be adapted, those of each block together."""

        def block(target: AdaptationTarget) -> str:
            found = self.block_path.match(target.path)
            return found[0] if found else target.path

        return [[target.module for target in group] for _, group in groupby(self.targets(module), block)]


class BaseModel:
    """A base model whose parts are read when first asked for, each with its memory settings, and freed one by one.

    A family gives `modules`, `predict`, `latent_shape`, `set_attention`, `make_text_encoder` and `metadata_entries`,
    and, where there is anything to say, `text_options` and `reads`; for another VAE than an `AutoencoderKL`,
    `make_vae_encoder` and `make_vae_decoder`.
    """

    modules: ClassVar[tuple[PartModule, ...]]
    """The parts that adapters can be for: text encoders in the order of their numbers, then the denoiser."""
    vae_encoder_roots: ClassVar[tuple[str, ...]] = ("encoder.", "quant_")
    """What the names of the tensors begin with that the VAE encoder's output depends on."""

    def __init__(
        self,
        checkpoint: ModelCheckpoint,
        noise: NoiseProcess,
        device: torch.device,
        dtype: torch.dtype,
        merging: Merging = NOTHING_MERGED,
    ) -> None:
        """A model of which nothing is read yet; `merging` has LoRA files that become part of its weights.

        An `AdapterError` if those do not fit it.
        """
        self.checkpoint = checkpoint
        self.noise = noise
        self.device = device
        self.dtype = dtype
        self._merging = merging
        self._read: dict[str, nn.Module] = {}
        self._text_encoder: TextEncoder | None = None
        self._vae_encoder: VaeEncoder | None = None
        self._vae_decoder: VaeDecoder | None = None
        self._attention: AttentionBackend | None = None
        self._checkpointed = 0.0
        self._formats: Mapping[str, str] = {}
        self._streamed: frozenset[str] = frozenset()
        self._compiler: str | None = None
        self._channels_last = False
        if merging:
            layers = self.empty_targets([own.part.name for own in self.modules])
            self._merging = merging.for_layers(layers)
            self._merging.check({layer.key: tuple(layer.module.get_parameter("weight").shape) for layer in layers})

    # What a family gives.

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output for noisy latents [B, C, h, w] at timesteps [B]: [B, C, h, w]."""
        raise NotImplementedError

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Shape [C, h, w] of the latents of an image of that size in pixels; reads no weights."""
        raise NotImplementedError

    def set_attention(self, denoiser: nn.Module, backend: AttentionBackend) -> None:
        """Let the denoiser compute attention with this backend."""
        raise NotImplementedError

    def make_text_encoder(self, modules: Mapping[str, nn.Module]) -> TextEncoder:
        """The text encoder, from the modules of all parts with text encoders, by name."""
        raise NotImplementedError

    def make_vae_encoder(self, part: CheckpointPart) -> VaeEncoder:
        """The VAE's encoder with its weights, in `vae_dtype` on the device."""
        return read_vae_encoder(part, self.device, self.vae_dtype)

    def make_vae_decoder(self, part: CheckpointPart) -> VaeDecoder:
        """The VAE's decoder with its weights, in `vae_dtype` on the device."""
        return read_vae_decoder(part, self.device, self.vae_dtype)

    def metadata_entries(self) -> Mapping[str, str]:
        """What LoRA files say about their base model besides file names, hashes and merged LoRA files."""
        raise NotImplementedError

    def text_options(self, memo: Memo) -> list[object]:  # noqa: ARG002
        """What the text encoder's output depends on besides stored weights and settings; plain values.

        Hashes of files are cached in `memo`.
        """
        return []

    def reads(self, target: AdaptationTarget) -> bool:  # noqa: ARG002
        """Whether the output of a layer has an effect on the model's; reads no weights."""
        return True

    @property
    def vae_dtype(self) -> torch.dtype:
        """The dtype that the VAE computes in."""
        return self.dtype

    # What follows from that.

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder with its tokenizer, read on first use."""
        if self._text_encoder is None:
            names = (own.part.name for own in self.modules if own.part.encoders)
            self._text_encoder = self.make_text_encoder({name: self.module(name) for name in names})
        return self._text_encoder

    @property
    def vae_encoder(self) -> VaeEncoder:
        """The VAE's encoder, read on first use."""
        if self._vae_encoder is None:
            self._vae_encoder = self.make_vae_encoder(self.checkpoint.part("vae"))
        return self._vae_encoder

    @property
    def vae_decoder(self) -> VaeDecoder:
        """The VAE's decoder, read on first use."""
        if self._vae_decoder is None:
            self._vae_decoder = self.make_vae_decoder(self.checkpoint.part("vae"))
        return self._vae_decoder

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser, read on first use, frozen."""
        return self.module(self.modules[-1].part.name)

    def module(self, name: str) -> nn.Module:
        """The module of a part that adapters can be for, read on first use, frozen."""
        if name not in self._read:
            own = next(own for own in self.modules if own.part.name == name)
            # What is to shrink goes to the device shrunk, so that the device never has to hold the whole.
            aside = name in self._formats or name in self._streamed
            device = torch.device("cpu") if aside else self.device
            part, edit = self.checkpoint.part(name), self._merging.edit(own.key)
            module = read_module(part, own.build, device, self.dtype, edit=edit)
            own.finish(module, part, device)
            self._place_weights(own, module)
            self._read[name] = module = module.to(self.device) if aside else module
            if not own.part.encoders:
                if self._attention is not None:
                    self.set_attention(module, self._attention)
                if self._channels_last:
                    use_channels_last(module, on=True)
            if self._checkpointed and (self._checkpointed == 1 or not own.part.encoders):
                own.checkpoint(module, self._checkpointed)
            if self._compiler is not None:
                compile_blocks(module, own.compiled, self._compiler)
        return self._read[name]

    def free(self, part: EncoderName | Literal["vae_decoder"]) -> None:
        """Forget a part's weights; it is read again if it is asked for again."""
        setattr(self, f"_{part}", None)
        for own in self.modules if part == "text_encoder" else ():
            if own.part.encoders:
                self.free_part(own.part.name)

    def free_part(self, name: str) -> None:
        """Forget the weights of a part that adapters can be for."""
        self._read.pop(name, None)

    def targets(self, parts: Sequence[str]) -> list[AdaptationTarget]:
        """The layers of these parts that can be adapted, text encoders first, whatever the order of `parts`."""
        wanted = [own for own in self.modules if own.part.name in parts]
        if any(own.part.encoders for own in wanted):
            _ = self.text_encoder  # refuses what its tokenizer does not fit
        found = [self._of_model(target) for own in wanted for target in own.targets(self.module(own.part.name))]
        if not self._checkpointed and not self._formats and not self._streamed:
            return found
        # Blocks that are computed again, or whose weights come and go, cannot compute what other blocks read.
        return [evolve(target, shares_within=target.path.rpartition(".")[0]) for target in found]

    def empty_targets(self, parts: Sequence[str]) -> list[AdaptationTarget]:
        """The same layers in modules without memory; reads no weights."""
        wanted = [own for own in self.modules if own.part.name in parts]
        return [
            self._of_model(target)
            for own in wanted
            for target in own.targets(empty_module(self.checkpoint.part(own.part.name), own.build))
        ]

    def _of_model(self, target: AdaptationTarget) -> AdaptationTarget:
        """A layer of a module as one of this model, which may not read it."""
        return target if self.reads(target) else evolve(target, is_read=False)

    def use_attention(self, backend: AttentionBackend) -> None:
        """Compute the denoiser's attention with this backend."""
        self._attention = backend
        for _, module in self._modules_read(denoiser_only=True):
            self.set_attention(module, backend)

    def quantize(self, formats: Mapping[str, str]) -> None:
        """Store the weights of these parts' layers in these formats from now on."""
        self._formats = dict(formats)
        self._apply_memory_settings()

    def stream(self, parts: Sequence[str]) -> None:
        """Keep the weights of these parts' layers in CPU RAM and swap them to the device block by block from now on."""
        self._streamed = frozenset(parts)
        self._apply_memory_settings()

    def compile(self, backend: str | None) -> None:
        """Compile the denoiser's blocks, adapters included, with this backend of torch.compile; None undoes it."""
        for own, module in self._modules_read(denoiser_only=True):
            if backend != self._compiler:
                compile_blocks(module, own.compiled, backend)
        self._compiler = backend

    def use_channels_last(self, on: bool) -> None:
        """Use channels-last memory format for images in the denoiser, or the default one."""
        self._channels_last = on
        for _, module in self._modules_read(denoiser_only=True):
            use_channels_last(module, on)

    def enable_gradient_checkpointing(self, share: float = 1.0) -> None:
        """Recompute activations of denoiser and text encoders in the backward pass instead of keeping them.

        With a share below 1, only in that share of the denoiser's blocks, those that keep the most.
        """
        self._checkpointed = share
        for own, module in self._modules_read(denoiser_only=share < 1):
            own.checkpoint(module, share)

    @contextmanager
    def without_training_adapter(self) -> Iterator[None]:
        """Inside, the denoiser computes as it is without the LoRA file that is merged only for training."""
        file = self._merging.training_adapter
        if file is None:
            yield
            return
        with taken_back(file, self.denoiser, self.device, self.dtype):
            yield

    def fingerprint(self, part: EncoderName, memo: Memo = PROCESS_MEMO) -> str:
        """A short key of all that an encoder's output depends on: weights, dtype, settings.

        The weights are read through once for as long as the memo remembers it.
        """
        described: list[Any] = []
        options: list[object] = []
        if part == "vae_encoder":
            stored = self.checkpoint.part("vae")
            names = {bare: at for bare, at in stored.file_names.items() if bare.startswith(self.vae_encoder_roots)}
            described += self._described(part, stored, names, self.vae_dtype, memo)
        else:
            options += self.text_options(memo)
            for own in self.modules:
                if own.part.encoders:
                    name = own.part.name
                    stored = self.checkpoint.part(name)
                    described += self._described(name, stored, stored.file_names, self.dtype, memo)
                    options += self._merging.fingerprint(own.part.lora_prefix, memo)
                    options += [self._formats[name]] if name in self._formats else []
        text = json.dumps([*described, options], sort_keys=True)
        return sha256(text.encode()).hexdigest()[:32]

    def metadata(self, memo: Memo = PROCESS_MEMO) -> Mapping[str, str]:
        """What LoRA files say about their base model; hashes each file of it, which takes seconds once."""
        entries = dict(self.metadata_entries())
        for name, location in self.checkpoint.sources.items():
            entries[f"ss_{name}_name"] = str(location) if isinstance(location, HubModel) else location.name
            if isinstance(location, Path) and location.is_file():
                # Both hashes by which web UIs find it.
                sha = memo.get_or_compute(location, "sha256", partial(hash_of_file, location))
                entries |= {f"ss_{name}_hash": short_hash_of_file(location), f"ss_new_{name}_hash": sha}
        return {**entries, **self._merging.metadata(memo)}

    def _modules_read(self, *, denoiser_only: bool = False) -> Iterator[tuple[PartModule, nn.Module]]:
        """The modules that are read, those of text encoders only on request."""
        for own in self.modules:
            if own.part.name in self._read and not (denoiser_only and own.part.encoders):
                yield own, self._read[own.part.name]

    def _described(
        self, name: str, stored: CheckpointPart, names: Mapping[str, Any], dtype: torch.dtype, memo: Memo
    ) -> list[object]:
        """The hash of a part's named weights, its dtype and its settings."""
        others = "".join(f" {file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in stored.files[1:])
        hashed = partial(hash_of_weights, stored.files, names)
        weights = memo.get_or_compute(stored.files[0], name + others, hashed)
        return [weights, str(dtype), dict(stored.settings)]

    def _apply_memory_settings(self) -> None:
        """Store the weights of what has been read as is asked for now."""
        for own, module in self._modules_read():
            self._place_weights(own, module)

    def _place_weights(self, own: PartModule, module: nn.Module) -> None:
        """Quantize the weights of a part's layers, offload them to CPU RAM, or both, if that is asked for."""
        name = own.part.name

        def quantized(layers: Sequence[nn.Module]) -> Sequence[nn.Module]:
            for layer in layers if name in self._formats else ():
                quantize(layer, self._formats[name], self.device)
            return layers

        # One block after the other, so that the device never has to hold all of them.
        blocks = map(quantized, own.blocks(module))
        if name in self._streamed:
            stream(blocks, self.device)
        else:
            for _ in blocks:
                pass
