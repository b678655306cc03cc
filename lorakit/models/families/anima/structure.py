"""The transformer of Anima and the adapter of its text encoder: settings, and the tensors that follow from them.

Settings are in the words of diffusers' configs. Tensors have the names of the original code. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from attrs import fields, frozen

from lorakit.checkpoints import Shapes

PATCH = 2
"""Side of a token in latents."""
TEXT_LENGTH = 512
"""The least number of rows that the transformer gets of a caption; those behind its end are zero."""
_MUST_BE: Mapping[str, tuple[object, ...]] = {
    "patch_size": ([1, PATCH, PATCH], (1, PATCH, PATCH)),
    "concat_padding_mask": (True,),
    "extra_pos_embed_type": (None,),
    "use_crossattn_projection": (False,),
    "controlnet_block_every_n": (None,),
    "img_context_dim_in": (None, 0),
    "use_self_attention": (True,),
    "use_layer_norm": (False,),
    "min_sequence_length": (TEXT_LENGTH,),
}
"""Settings that are the same in all models of the family."""

ConfigT = TypeVar("ConfigT", bound="_Config")


@frozen(kw_only=True)
class _Config:
    """Settings of a part."""

    @classmethod
    def of(cls: type[ConfigT], settings: Mapping[str, Any]) -> ConfigT:
        """Those among some settings that make a difference for Anima.

        Raises ValueError for one that would make a difference and that no Anima has.
        """
        for name, value in settings.items():
            if name in _MUST_BE and value not in _MUST_BE[name]:
                raise ValueError(f"{name} is {value!r}, which it is in no Anima")
        names = {own.name for own in fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in names})


@frozen(kw_only=True)
class TransformerConfig(_Config):
    """Settings of the transformer; absent ones are those of the published model."""

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 16
    attention_head_dim: int = 128
    num_layers: int = 28
    mlp_ratio: float = 4.0
    text_embed_dim: int = 1024
    adaln_lora_dim: int = 256
    """Width of the bottleneck between the time embedding and the modulation of a block."""
    rope_scale: tuple[float, float, float] = (1.0, 4.0, 4.0)
    """How far frames, rows and columns reach, compared with those of the first training."""

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        """Channels in the middle of an MLP."""
        return int(self.width * self.mlp_ratio)


@frozen(kw_only=True)
class ConditionerConfig(_Config):
    """Settings of the adapter from the text encoder to the transformer; absent ones as in the published model."""

    source_dim: int = 1024
    """Channels of the text encoder's states."""
    target_dim: int = 1024
    """Channels of what the transformer reads."""
    model_dim: int = 1024
    num_layers: int = 6
    num_attention_heads: int = 16
    mlp_ratio: float = 4.0
    target_vocab_size: int = 32128
    """Tokens of T5's tokenizer, whose ids are the queries."""

    @property
    def mlp_width(self) -> int:
        """Channels in the middle of an MLP."""
        return int(self.model_dim * self.mlp_ratio)


def infer_transformer(shapes: Shapes) -> dict[str, Any]:
    """Settings of a transformer from the shapes of its tensors; raises KeyError with the name of a missing one."""
    width, inputs = shapes["x_embedder.proj.1.weight"]
    return {
        "in_channels": inputs // PATCH**2 - 1,  # the last is the padding mask's
        "out_channels": shapes["final_layer.linear.weight"][0] // PATCH**2,
        "num_attention_heads": width // shapes["blocks.0.self_attn.q_norm.weight"][0],
        "attention_head_dim": shapes["blocks.0.self_attn.q_norm.weight"][0],
        "num_layers": _blocks(shapes),
        "mlp_ratio": shapes["blocks.0.mlp.layer1.weight"][0] / width,
        "text_embed_dim": shapes["blocks.0.cross_attn.k_proj.weight"][1],
        "adaln_lora_dim": shapes["blocks.0.adaln_modulation_self_attn.1.weight"][0],
    }


def infer_conditioner(shapes: Shapes) -> dict[str, Any]:
    """Settings of an adapter from the shapes of its tensors; raises KeyError with the name of a missing one."""
    target, model = shapes["out_proj.weight"]
    return {
        "source_dim": shapes["blocks.0.cross_attn.k_proj.weight"][1],
        "target_dim": target,
        "model_dim": model,
        "num_layers": _blocks(shapes),
        "num_attention_heads": model // shapes["blocks.0.cross_attn.q_norm.weight"][0],
        "mlp_ratio": shapes["blocks.0.mlp.0.weight"][0] / model,
        "target_vocab_size": shapes["embed.weight"][0],
    }


def transformer_shapes(settings: Mapping[str, Any]) -> Shapes:
    """The tensors of a transformer with these settings."""
    config = TransformerConfig.of(settings)
    width, bottleneck = config.width, config.adaln_lora_dim
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.1.weight": (width, (config.in_channels + 1) * PATCH**2),
        "t_embedder.1.linear_1.weight": (width, width),
        "t_embedder.1.linear_2.weight": (3 * width, width),
        "t_embedding_norm.weight": (width,),
        "final_layer.linear.weight": (config.out_channels * PATCH**2, width),
        "final_layer.adaln_modulation.1.weight": (bottleneck, width),
        "final_layer.adaln_modulation.2.weight": (2 * width, bottleneck),
    }
    for block in (f"blocks.{number}" for number in range(config.num_layers)):
        heads = (width, config.attention_head_dim)
        shapes |= _attention(f"{block}.self_attn", heads, (width, width), "output_proj")
        shapes |= _attention(f"{block}.cross_attn", heads, (width, config.text_embed_dim), "output_proj")
        shapes[f"{block}.mlp.layer1.weight"] = (config.mlp_width, width)
        shapes[f"{block}.mlp.layer2.weight"] = (width, config.mlp_width)
        for layer in ("self_attn", "cross_attn", "mlp"):
            shapes[f"{block}.adaln_modulation_{layer}.1.weight"] = (bottleneck, width)
            shapes[f"{block}.adaln_modulation_{layer}.2.weight"] = (3 * width, bottleneck)
    return shapes


def conditioner_shapes(settings: Mapping[str, Any]) -> Shapes:
    """The tensors of an adapter with these settings."""
    config = ConditionerConfig.of(settings)
    width, target, hidden = config.model_dim, config.target_dim, config.mlp_width
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (config.target_vocab_size, target),
        "out_proj.weight": (target, width),
        "out_proj.bias": (target,),
        "norm.weight": (target,),
    }
    if width != target:
        shapes |= {"in_proj.weight": (width, target), "in_proj.bias": (width,)}
    for block in (f"blocks.{number}" for number in range(config.num_layers)):
        heads = (width, width // config.num_attention_heads)
        shapes |= _attention(f"{block}.self_attn", heads, (width, width), "o_proj")
        shapes |= _attention(f"{block}.cross_attn", heads, (width, config.source_dim), "o_proj")
        shapes |= {f"{block}.norm_{layer}.weight": (width,) for layer in ("self_attn", "cross_attn", "mlp")}
        shapes |= {f"{block}.mlp.0.weight": (hidden, width), f"{block}.mlp.0.bias": (hidden,)}
        shapes |= {f"{block}.mlp.2.weight": (width, hidden), f"{block}.mlp.2.bias": (width,)}
    return shapes


def _attention(
    path: str, heads: tuple[int, int], inputs: tuple[int, int], output: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of an attention: widths of all heads and of one, of tokens and of their context, name of the last."""
    width, head = heads
    tokens, context = inputs
    yield f"{path}.q_proj.weight", (width, tokens)
    yield f"{path}.q_norm.weight", (head,)
    yield f"{path}.k_proj.weight", (width, context)
    yield f"{path}.k_norm.weight", (head,)
    yield f"{path}.v_proj.weight", (width, context)
    yield f"{path}.{output}.weight", (tokens, width)


def _blocks(shapes: Shapes) -> int:
    """Number of blocks that some tensors are of."""
    return 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
