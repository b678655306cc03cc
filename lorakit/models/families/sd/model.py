"""Stable Diffusion 1.x and 2.x as the engine sees them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from attrs import frozen
from torch import Tensor, nn

from lorakit.checkpoints import HubModel
from lorakit.diffusion.noise_schedule import DDPMSchedule, Prediction
from lorakit.diffusion.process import NoiseProcess
from lorakit.errors import ModelError
from lorakit.models.families.sd.checkpoint import TOKENIZER_FILES, CheckpointPart, ModelCheckpoint
from lorakit.models.families.sd.infer_config import DOWNSCALING, LATENT_CHANNELS
from lorakit.models.families.sd.load import compile_unet, empty_module, read_unet, unet_module
from lorakit.models.families.sd.targets import (
    layers_by_block,
    text_encoder_key,
    text_encoder_targets,
    unet_blocks,
    unet_key,
    unet_targets,
)
from lorakit.models.families.sd.text_encoder import ClipTextEncoder, checkpoint_layers, clip_module, read_clip
from lorakit.models.families.sd.tokenizer import CaptionTokenizer
from lorakit.models.families.sd.unet import use_backend
from lorakit.models.families.sd.vae import VaeDecoder, VaeEncoder, read_vae_decoder, read_vae_encoder
from lorakit.models.interfaces import AdaptationTarget, AttentionBackend, Conditioning, Memo
from lorakit.models.memory.activation_checkpointing import checkpoint_blocks
from lorakit.models.memory.block_swap import stream
from lorakit.models.memory.channels_last import use_channels_last
from lorakit.models.memory.quantization import quantize
from lorakit.models.weights.hashing import ProcessMemo, hash_of_file, hash_of_weights, short_hash_of_file
from lorakit.models.weights.load import EditTensor
from lorakit.models.weights.merge_lora import Merging

ReadModule = Callable[[CheckpointPart, torch.device, torch.dtype, EditTensor | None], nn.Module]
"""Reads a stored part to a device, in a number format, its weights edited."""

_PROCESS_MEMO = ProcessMemo()
_PADS_WITH_A_WORD = "padding is a word in captions"
"""Told apart in the cache from captions that were encoded with each `!` as padding."""
_NOTHING_MERGED = Merging(())
_TARGETS = {"unet": unet_targets, "text_encoder": text_encoder_targets}
_KEYS = {"unet": unet_key, "text_encoder": text_encoder_key}


@frozen(kw_only=True)
class Variant:
    """What a version of Stable Diffusion is called in LoRA files, and how a user wants it run."""

    version: str
    """`ss_base_model_version` without what tells the prediction: `sd_v1`."""
    architecture: str
    """`modelspec.architecture`: `stable-diffusion-v1/lora`."""
    prediction: Prediction = "epsilon"
    """What the U-Net predicts."""
    clip_skip: int = 1
    """Which of the text encoder's layers is read, counted from the last, which is 1."""
    max_token_length: int = 75
    """Longest caption in tokens, a multiple of 75."""
    pad_token: int | None = None
    """Token id that fills short captions up; the end token when absent."""
    no_half_vae: bool = False
    """Whether the VAE computes in float32 where the rest does not."""


def _stamp(files: Sequence[Path]) -> str:
    """A text that changes when one of the files does; empty for no files."""
    return "".join(f" {file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


class StableDiffusion:
    """A U-Net, the two halves of a VAE and a CLIP text encoder, each read when it is first asked for."""

    def __init__(
        self,
        stored: ModelCheckpoint,
        variant: Variant,
        device: torch.device,
        dtype: torch.dtype,
        memo: Memo = _PROCESS_MEMO,
        merging: Merging = _NOTHING_MERGED,
    ) -> None:
        """A model of which nothing is read yet; `merging` has LoRA files that become part of its weights.

        An `AdapterError` if those do not fit it.
        """
        self.stored = stored
        self.variant = variant
        self.device = device
        self.dtype = dtype
        self.memo = memo
        """Remembers hashes of files; one that outlives the process makes the next start faster."""
        self.noise: NoiseProcess = DDPMSchedule(variant.prediction)
        self._vae_encoder: VaeEncoder | None = None
        self._vae_decoder: VaeDecoder | None = None
        self._text_encoder: ClipTextEncoder | None = None
        self._unet: nn.Module | None = None
        self._attention: AttentionBackend | None = None
        self._recomputed = 0.0
        self._formats: Mapping[str, str] = {}
        self._streamed: frozenset[str] = frozenset()
        self._compiler: str | None = None
        self._channels_last = False
        self._merging = merging
        if merging:
            merging.check(self._layers())

    def fingerprint(self, part: Literal["vae_encoder", "text_encoder"]) -> str:
        """A short key of all that the part's output depends on: weights, number format, settings.

        The weights are read through once for as long as the memo remembers it.
        """
        if part == "vae_encoder":
            stored = self.stored.part("vae")
            names = {bare: name for bare, name in stored.file_names.items() if bare.startswith(("encoder.", "quant_"))}
            options: list[object] = []
        else:
            stored = self.stored.part("text_encoder")
            names = dict(stored.file_names)
            options = [
                self.variant.clip_skip,
                self.variant.max_token_length,
                self.variant.pad_token,
                self._tokenizer_hash(),
                *([_PADS_WITH_A_WORD] if self.variant.pad_token is not None else []),
                *self._merging.fingerprint("lora_te", self.memo),
                *([self._formats[part]] if part in self._formats else []),
            ]
        hashed = partial(hash_of_weights, stored.files, names)
        weights = self.memo.get_or_compute(stored.files[0], part + _stamp(stored.files[1:]), hashed)
        dtype = self._vae_dtype if part == "vae_encoder" else self.dtype
        text = json.dumps([weights, str(dtype), dict(stored.settings), options], sort_keys=True)
        return sha256(text.encode()).hexdigest()[:32]

    @property
    def _vae_dtype(self) -> torch.dtype:
        return torch.float32 if self.variant.no_half_vae else self.dtype

    @property
    def vae_encoder(self) -> VaeEncoder:
        """The VAE's encoder, read on first use."""
        if self._vae_encoder is None:
            self._vae_encoder = read_vae_encoder(self.stored.part("vae"), self.device, self._vae_dtype)
        return self._vae_encoder

    @property
    def vae_decoder(self) -> VaeDecoder:
        """The VAE's decoder, read on first use."""
        if self._vae_decoder is None:
            self._vae_decoder = read_vae_decoder(self.stored.part("vae"), self.device, self._vae_dtype)
        return self._vae_decoder

    @property
    def text_encoder(self) -> ClipTextEncoder:
        """The text encoder with its tokenizer, read on first use."""
        if self._text_encoder is None:
            part = self.stored.part("text_encoder")
            module = self._read("text_encoder", read_clip)
            if self._recomputed == 1:
                checkpoint_layers(module)
            self._text_encoder = ClipTextEncoder(module, self._tokenizer(part), self.variant.clip_skip)
        return self._text_encoder

    @property
    def denoiser(self) -> nn.Module:
        """The U-Net, read on first use, frozen."""
        if self._unet is None:
            self._unet = self._read("unet", read_unet)
            if self._attention is not None:
                use_backend(self._unet, self._attention)
            if self._recomputed:
                checkpoint_blocks(unet_blocks(self._unet), self._recomputed)
            if self._channels_last:
                use_channels_last(self._unet, on=True)
            if self._compiler is not None:
                compile_unet(self._unet, self._compiler)
        return self._unet

    def free(self, part: Literal["vae_encoder", "vae_decoder", "text_encoder"]) -> None:
        """Forget a part's weights; it is read again if it is asked for again."""
        setattr(self, f"_{part}", None)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Shape [C, h, w] of the latents of an image of that size in pixels."""
        return LATENT_CHANNELS, height // DOWNSCALING, width // DOWNSCALING

    def targets(self, parts: Sequence[str]) -> list[AdaptationTarget]:
        """The layers of `text_encoder` and `unet` that can be adapted, in this order whatever the order of `parts`."""
        found: list[AdaptationTarget] = []
        if "text_encoder" in parts:
            found += text_encoder_targets(self.text_encoder.module)
        if "unet" in parts:
            found += unet_targets(self.denoiser)
        return found

    def use_attention(self, backend: AttentionBackend) -> None:
        """Compute the U-Net's attention with this backend."""
        self._attention = backend
        if self._unet is not None:
            use_backend(self._unet, backend)

    def quantize(self, formats: Mapping[str, str]) -> None:
        """Keep the weights of the layers of `unet`, `text_encoder` or both in these forms from now on."""
        self._formats = dict(formats)
        self._settle()

    def stream(self, parts: Sequence[str]) -> None:
        """Keep the weights of the layers of `unet`, `text_encoder` or both in the host's memory from now on."""
        self._streamed = frozenset(parts)
        self._settle()

    def compile(self, backend: str | None) -> None:
        """Compile the U-Net's ResNet and transformer blocks, adapters included, with this backend of torch.compile.

        With None they run as they are written.
        """
        if self._unet is not None and backend != self._compiler:
            compile_unet(self._unet, backend)
        self._compiler = backend

    def use_channels_last(self, on: bool) -> None:
        """Keep images in the U-Net with channels last in memory, or first."""
        self._channels_last = on
        if self._unet is not None:
            use_channels_last(self._unet, on)

    def enable_gradient_checkpointing(self, share: float = 1.0) -> None:
        """Recompute activations of U-Net and text encoder in the backward pass instead of keeping them.

        With a share below 1, only in that share of the U-Net's ResNet and transformer blocks, those that keep most.
        """
        self._recomputed = share
        if self._unet is not None:
            checkpoint_blocks(unet_blocks(self._unet), share)
        if self._text_encoder is not None and share == 1:
            checkpoint_layers(self._text_encoder.module)

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's output, [B, 4, h, w], for noisy latents of that shape, timesteps [B] and `hidden_states`."""
        context = conditioning["hidden_states"].to(self.dtype)
        prediction: Tensor = self.denoiser(noisy_latents.to(self.dtype), timesteps, context)
        return prediction

    def metadata(self) -> Mapping[str, str]:
        """What LoRA files say about their base model; hashes a model that is a file, which takes seconds once."""
        velocity = self.variant.prediction == "v_prediction"
        location = self.stored.location
        entries = {
            "ss_base_model_version": self.variant.version + ("_v" if velocity else ""),
            "ss_v2": str(self.variant.version.startswith("sd_v2")),
            "ss_clip_skip": str(self.variant.clip_skip),
            "ss_max_token_length": str(self.variant.max_token_length),
            "ss_sd_model_name": str(location) if isinstance(location, HubModel) else location.name,
            "modelspec.architecture": self.variant.architecture,
            "modelspec.implementation": "diffusers",
            "modelspec.prediction_type": "v" if velocity else "epsilon",
        }
        if self.variant.clip_skip > 1:
            entries["modelspec.encoder_layer"] = str(self.variant.clip_skip)
        if not isinstance(location, HubModel):
            entries |= self._hashes(location, "sd_model")
        if self.stored.vae is not None:
            vae = self.stored.vae
            entries |= (
                {"ss_vae_name": str(vae)}
                if isinstance(vae, HubModel)
                else {"ss_vae_name": vae.name, **self._hashes(vae, "vae")}
            )
        return {**entries, **self._merging.metadata(self.memo)}

    def _layers(self) -> dict[str, tuple[int, ...]]:
        """Shape of the weights of each layer that LoRA files may be for, by key; reads no weights."""
        text_part, unet_part = self.stored.part("text_encoder"), self.stored.part("unet")
        encoder = empty_module(text_part, partial(clip_module, text_part))
        unet = empty_module(unet_part, partial(unet_module, unet_part))
        targets = (*text_encoder_targets(encoder), *unet_targets(unet))
        return {target.key: tuple(target.module.get_parameter("weight").shape) for target in targets}

    def _read(self, part: Literal["unet", "text_encoder"], read: ReadModule) -> nn.Module:
        """A part's module on the device."""
        # What is to shrink goes to the device shrunk, so that the device never has to hold the whole.
        aside = part in self._formats or part in self._streamed
        device = torch.device("cpu") if aside else self.device
        module = read(self.stored.part(part), device, self.dtype, self._merging.edit(_KEYS[part]))
        self._keep(part, module)
        return module.to(self.device) if aside else module

    def _settle(self) -> None:
        """Keep the weights of what has been read as is asked for now."""
        if self._unet is not None:
            self._keep("unet", self._unet)
        if self._text_encoder is not None:
            self._keep("text_encoder", self._text_encoder.module)

    def _keep(self, part: Literal["unet", "text_encoder"], module: nn.Module) -> None:
        """Keep the weights of a part's layers in fewer bits, in the host's memory, or both, if they are to be."""
        blocks = layers_by_block(_TARGETS[part](module))
        if part in self._streamed:
            # One block after the other, so that the device never has to hold all of them.
            stream((self._shrunk(part, block) for block in blocks), self.device)
        else:
            for block in blocks:
                self._shrunk(part, block)

    def _shrunk(self, part: Literal["unet", "text_encoder"], layers: Sequence[nn.Module]) -> Sequence[nn.Module]:
        """The same layers, in fewer bits if those of the part are to be."""
        for layer in layers if part in self._formats else ():
            quantize(layer, self._formats[part], self.device)
        return layers

    def _hashes(self, path: Path, name: str) -> dict[str, str]:
        """Both hashes of a file by which web UIs find it; none of a folder."""
        if not path.is_file():
            return {}
        return {
            f"ss_{name}_hash": short_hash_of_file(path),
            f"ss_new_{name}_hash": self.memo.get_or_compute(path, "sha256", partial(hash_of_file, path)),
        }

    def _tokenizer(self, part: CheckpointPart) -> CaptionTokenizer:
        tokenizer = CaptionTokenizer(
            self.stored.tokenizer_folder(), self.variant.max_token_length, self.variant.pad_token
        )
        vocabulary, layers = part.shape_of("embeddings.token_embedding.weight")[0], part.settings["num_hidden_layers"]
        if tokenizer.vocabulary_size > vocabulary:
            raise ModelError(f"{part} knows {vocabulary} tokens, but its tokenizer has {tokenizer.vocabulary_size}")
        if self.variant.clip_skip > layers:
            raise ModelError(
                f"{part} has {layers} layers; clip_skip must be at most that, not {self.variant.clip_skip}"
            )
        return tokenizer

    def _tokenizer_hash(self) -> str:
        """A hash of the model's own tokenizer; empty where it uses CLIP's."""
        folder = self.stored.tokenizer_folder()
        if folder is None:
            return ""
        files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        return " ".join(self.memo.get_or_compute(file, "sha256", partial(hash_of_file, file)) for file in files)
