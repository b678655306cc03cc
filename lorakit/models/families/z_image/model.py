"""Z-Image as the trainer sees it.

B images in a micro-batch, h and w latent sides, m tokens of the longest caption, filled up to a multiple of 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lorakit.models.base import PartModule
from lorakit.models.families.flow.config import MAX_TOKENS
from lorakit.models.families.flow.model import FlowTransformer
from lorakit.models.families.flow.qwen3 import (
    QWEN3,
    Qwen3Tokenizer,
    leave_out_last,
    qwen3_key,
    qwen3_module,
    qwen3_targets,
    set_rotary,
)
from lorakit.models.families.z_image.parts import LAYOUT, TEMPLATE, TRANSFORMER, block_index, transformer_key
from lorakit.models.families.z_image.transformer import MULTIPLE, Block, ZImageSettings, ZImageTransformer
from lorakit.models.interfaces import AdaptationTarget, Conditioning, Memo, Tokens
from lorakit.models.weights.checkpoint import CheckpointPart
from lorakit.models.weights.folders import TensorSlice

_KINDS = {"attention": "attention", "feed_forward": "mlp", "adaLN_modulation": "modulation"}
_QKV = {"to_q": 0, "to_k": 1, "to_v": 2}
"""The layers that are thirds of one layer in the original code."""
_SHARED = {*_QKV, "w1", "w3"}
"""The layers that read the same as others of their module."""


def transformer_module(part: CheckpointPart) -> ZImageTransformer:
    """A transformer with the part's settings, its weights still to be read."""
    return ZImageTransformer(ZImageSettings.of(part.settings))


def transformer_targets(root: nn.Module) -> Iterator[AdaptationTarget]:
    """The linear layers of all blocks; those of the main blocks' attention and MLPs have the tag `transformer`."""
    for path, layer in root.named_modules():
        index = block_index(path)
        if index is None or not isinstance(layer, nn.Linear):
            continue
        group, _, kind, *_, leaf = path.split(".")
        tags = {_KINDS[kind]}
        if group != "layers":
            tags.add("refiner")
        elif kind != "adaLN_modulation":
            tags.add("transformer")
        module = path.rpartition(".")[0]
        fused = transformer_key(f"{module}.qkv")
        rows = layer.out_features
        yield AdaptationTarget(
            key=transformer_key(path),
            part=TRANSFORMER.name,
            root=root,
            path=path,
            tags=frozenset(tags),
            block_index=index,
            layout=LAYOUT,
            diffusers_path=f"transformer.{path}",
            original_path=f"diffusion_model.{path}",
            # In the original code: the attention's last layer.
            other_keys=(transformer_key(path.replace(".to_out.0", ".out")),) if kind == "attention" else (),
            shared_input=module if leaf in _SHARED else "",
            fused_in=TensorSlice(fused, _QKV[leaf] * rows, (_QKV[leaf] + 1) * rows) if leaf in _QKV else None,
        )


def finish_text_encoder(module: nn.Module, part: CheckpointPart, device: torch.device) -> None:
    """Compute rotary positions, and leave the last layer out, which Z-Image does not read."""
    set_rotary(module, part, device)
    leave_out_last(module)


class ZImageTextEncoder:
    """Qwen3 with its tokenizer."""

    def __init__(self, module: nn.Module, tokenizer: Qwen3Tokenizer) -> None:
        self.module = module
        self.tokenizer = tokenizer

    def tokenize(self, captions: Sequence[str], weighted: bool = False) -> Tokens:  # noqa: ARG002
        """`ids` and `mask`, int64 [B, m], on the CPU; captions are cut off at the longest length."""
        return self.tokenizer(captions)

    def encode(self, tokens: Tokens) -> Conditioning:
        """`hidden_states` before the last layer, [B, m, D], and `mask`, int64 [B, m], 0 behind each caption."""
        device = next(self.module.parameters()).device
        ids, mask = tokens["ids"].to(device), tokens["mask"].to(device)
        states: Tensor = self.module(input_ids=ids, attention_mask=mask).last_hidden_state
        return filled({"hidden_states": states * mask.unsqueeze(2).to(states.dtype), "lengths": mask.sum(dim=1)})


def filled(conditioning: Conditioning) -> dict[str, Tensor]:
    """Captions [B, m, D] of these lengths [B] with m filled up to a multiple of 32.

    `attention_mask`, bool [B, m], is false behind the multiple of 32 that a caption is filled up to.
    """
    states, lengths = conditioning["hidden_states"], conditioning["lengths"]
    states = F.pad(states, (0, 0, 0, -states.shape[1] % MULTIPLE))
    attended = -(-lengths // MULTIPLE) * MULTIPLE
    numbers = torch.arange(states.shape[1], device=lengths.device)
    return {"hidden_states": states, "lengths": lengths, "attention_mask": numbers < attended.unsqueeze(1)}


class ZImage(FlowTransformer):
    """The transformer, Qwen3 and FLUX.1's VAE."""

    modules = (
        PartModule(
            part=QWEN3,
            build=qwen3_module,
            targets=partial(qwen3_targets, unread=1),
            key=qwen3_key,
            finish=finish_text_encoder,
        ),
        PartModule(
            part=TRANSFORMER,
            build=transformer_module,
            targets=transformer_targets,
            key=transformer_key,
            finish=lambda module, _, device: module.set_rotary(device),  # type: ignore[operator]
            compiled=(Block,),
        ),
    )

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity ε − x₀, [B, 16, h, w]; the transformer counts time from noise to image and predicts −v."""
        states = conditioning["hidden_states"].to(self.dtype)
        found: Tensor = self.denoiser(
            noisy_latents.to(self.dtype), 1 - timesteps.float(), states, conditioning["lengths"],
            conditioning.get("attention_mask"),
        )  # fmt: skip
        return -found

    def split(self, conditioning: Conditioning) -> Sequence[Conditioning]:
        """Each caption without its padding."""
        pairs = zip(conditioning["hidden_states"], conditioning["lengths"].tolist(), strict=True)
        return [{"hidden_states": states[:length]} for states, length in pairs]

    def collate(self, captions: Sequence[Conditioning]) -> Conditioning:
        """Captions filled up with zeros to one length, their own lengths, and a mask if some need one."""
        states = [caption["hidden_states"] for caption in captions]
        lengths = torch.tensor([len(own) for own in states], device=states[0].device)
        found = filled({"hidden_states": nn.utils.rnn.pad_sequence(states, batch_first=True), "lengths": lengths})
        if all(-(-len(own) // MULTIPLE) * MULTIPLE == found["hidden_states"].shape[1] for own in states):
            del found["attention_mask"]  # attention without one is faster
        return found

    def make_text_encoder(self, modules: Mapping[str, nn.Module]) -> ZImageTextEncoder:
        """Qwen3 with its tokenizer."""
        tokenizer = Qwen3Tokenizer(self.tokenizer_folder("tokenizer"), TEMPLATE, MAX_TOKENS)
        return ZImageTextEncoder(modules[QWEN3.name], tokenizer)

    def text_options(self, memo: Memo) -> list[object]:
        """How captions are put to the text encoder, and hashes of the tokenizer."""
        hashes = self.tokenizer_hashes(memo, [self.tokenizer_folder("tokenizer")])
        return [TEMPLATE, MAX_TOKENS, "before the last layer", hashes]

    def metadata_entries(self) -> Mapping[str, str]:
        """What the model is called by other tools."""
        return {
            "ss_base_model_version": "zimage",
            "modelspec.architecture": "Z-Image/lora",
            "modelspec.implementation": "https://github.com/Tongyi-MAI/Z-Image",
        }
