"""Qwen3 as a text encoder: how files have it, its module, its layers, and its tokenizer.

B captions of at most m tokens, D channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.api.components import ModelPart
from lorakit.checkpoints import Shapes
from lorakit.errors import ModelError
from lorakit.models.families.flow.tokenizer_files import read_tokenizer_json, tokenizer_errors
from lorakit.models.weights.checkpoint import TRANSFORMERS_FILES, CheckpointPart, PartFormat, Settings
from lorakit.models.weights.counting import count

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorakit.models.interfaces import AdaptationTarget, Tokens

QWEN3 = ModelPart("text_encoder", title="text encoder (Qwen3)", encoders=(0,), lora_prefix="lora_te_")
"""The part with the text encoder."""
PAD = "<|endoftext|>"
"""The token that captions are filled up with."""

_ROPE_THETA = 1_000_000.0
_DEFAULTS = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False}
_SETTINGS = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "attention_bias", "max_position_embeddings",
    "rope_theta", "rope_parameters",
})  # fmt: skip
_TAGS = {"self_attn": "attention", "mlp": "mlp"}
_SHARED = re.compile(r"(.*self_attn)\.[qkv]_proj|(.*mlp)\.(?:gate|up)_proj")


def qwen3_format(family: str, prefix: str) -> PartFormat:
    """Qwen3 in files of a family; `prefix` is what its tensors begin with in a file with all parts."""
    return PartFormat(
        name=QWEN3.name,
        title=QWEN3.title,
        family=family,
        files=TRANSFORMERS_FILES,
        prefix=prefix,
        inner_prefix="model.",
        roots=("embed_tokens.", "layers.", "norm."),
        infer=qwen3_settings,
        shapes=qwen3_shapes,
    )


def qwen3_settings(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `Qwen3Config` for the tensors of a text encoder."""
    vocabulary, hidden = shapes["embed_tokens.weight"]
    (head,) = shapes["layers.0.self_attn.q_norm.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": shapes["layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": count(shapes, "layers.{}."),
        "num_attention_heads": shapes["layers.0.self_attn.q_proj.weight"][0] // head,
        "num_key_value_heads": shapes["layers.0.self_attn.k_proj.weight"][0] // head,
        "head_dim": head,
        "rope_theta": _ROPE_THETA,
    }


def qwen3_shapes(settings: Settings) -> Shapes:
    """The tensors of a Qwen3 with these settings."""
    return dict(_tensors(settings))


def _tensors(settings: Settings) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, head = (settings[name] for name in ("hidden_size", "intermediate_size", "head_dim"))
    queries, keys = (head * settings[f"num_{name}_heads"] for name in ("attention", "key_value"))
    yield "embed_tokens.weight", (settings["vocab_size"], hidden)
    yield "norm.weight", (hidden,)
    for index in range(settings["num_hidden_layers"]):
        layer = f"layers.{index}"
        for name, outputs in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{layer}.self_attn.{name}_proj.weight", (outputs, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
        for name in ("q", "k"):
            yield f"{layer}.self_attn.{name}_norm.weight", (head,)
        for name in ("gate", "up"):
            yield f"{layer}.mlp.{name}_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{name}.weight", (hidden,)


def qwen3_module(part: CheckpointPart) -> nn.Module:
    """A module for the text encoder, its weights still to be read."""
    from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

    settings = {name: value for name, value in part.settings.items() if name in _SETTINGS and value is not None}
    return Qwen3Model(Qwen3Config(**{**_DEFAULTS, **settings, "use_cache": False}))


def set_rotary(module: nn.Module, part: CheckpointPart, device: torch.device) -> None:  # noqa: ARG001
    """Compute the rotary positions of a text encoder, which files do not hold."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    module.rotary_emb = Qwen3RotaryEmbedding(module.config).to(device)  # type: ignore[arg-type]


def leave_out_last(module: nn.Module) -> None:
    """Let the last layer's input be the output, for families that read the hidden states before it."""
    from torch import nn

    module.config.num_hidden_layers -= 1  # type: ignore[operator, union-attr]
    module.norm = nn.Identity()


def qwen3_targets(encoder: nn.Module, unread: int = 0) -> Iterator[AdaptationTarget]:
    """The projections of attention and MLP in every layer; of the last, so many are not read."""
    from torch import nn

    from lorakit.models.interfaces import AdaptationTarget

    read = len(encoder.get_submodule("layers")) - unread  # type: ignore[arg-type]
    for path, layer in encoder.named_modules():
        if isinstance(layer, nn.Linear) and path.startswith("layers."):
            shared = _SHARED.fullmatch(path)
            yield AdaptationTarget(
                key=qwen3_key(path),
                part=QWEN3.name,
                root=encoder,
                path=path,
                tags=frozenset({"text_encoder", _TAGS[path.split(".")[2]]}),
                encoder_index=0,
                diffusers_path=f"text_encoder.model.{path}",
                shared_input=next(filter(None, shared.groups())) if shared else "",
                is_read=int(path.split(".")[1]) < read,
            )


def qwen3_key(path: str) -> str:
    """The name in LoRA files of a layer, by its path in the text encoder."""
    return f"{QWEN3.lora_prefix}{path.replace('.', '_')}"


class Qwen3Tokenizer:
    """Turns captions in a template into token ids."""

    def __init__(self, folder: Path, template: str, max_length: int) -> None:
        """With the vocabulary in a folder; `template` holds `{}` for the caption.

        What is longer than `max_length` tokens, the template counted, is cut off. A `ModelError` if the folder's files
        are unusable.
        """
        from transformers import AutoTokenizer

        self.folder, self.template, self.max_length = folder, template, max_length
        with tokenizer_errors(folder):
            # Code that comes with a tokenizer is never run.
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if self._tokenizer.convert_tokens_to_ids(PAD) is None:
            raise ModelError(f"the tokenizer in {folder} has no {PAD}; it is not that of Qwen3")

    def __call__(self, captions: Sequence[str]) -> Tokens:
        """`ids` and `mask`, int64 [B, m]; the mask is 0 behind each caption's own tokens."""
        import torch

        texts = [self.template.replace("{}", caption) for caption in captions]
        ids = self._tokenizer(texts, truncation=True, max_length=self.max_length, add_special_tokens=False).input_ids
        longest = max(1, *map(len, ids))  # there may be no word and no template
        pad = self._tokenizer.convert_tokens_to_ids(PAD)
        filled = [[*own, *[pad] * (longest - len(own))] for own in ids]
        masks = [[1] * len(own) + [0] * (longest - len(own)) for own in ids]
        return {"ids": torch.tensor(filled), "mask": torch.tensor(masks)}


def qwen3_lengths(folder: Path, template: str, captions: Sequence[str]) -> list[int]:
    """How many tokens captions have in a template, before anything is cut off; imports no torch.

    A `ModelError` unless the tokenizer's folder has a `tokenizer.json` that can be read.
    """
    texts = [template.replace("{}", caption) for caption in captions]
    with tokenizer_errors(folder):
        tokenizer = read_tokenizer_json(folder)
        return [len(own.ids) for own in tokenizer.encode_batch(texts, add_special_tokens=False)]
