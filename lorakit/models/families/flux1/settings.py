"""What tells one transformer of FLUX.1 or Chroma from another, in the words of diffusers' configs; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import field, fields, frozen

from lorakit.checkpoints import Shapes
from lorakit.models.weights.counting import count

MLP_RATIO = 4
"""How many times wider than the tokens the hidden layer of an MLP is."""
TIME_CHANNELS = 256
"""Cosines and sines of a timestep or a guidance scale that FLUX.1 is given."""
VECTORS = {"double": 6, "single": 3, "final": 2}
"""Modulation vectors of a stream of a double block, of a single block and of the last layer."""


@frozen(kw_only=True)
class FluxSettings:
    """Settings of a transformer; where they are absent, they are diffusers' defaults."""

    in_channels: int = 64
    out_channels: int | None = None
    """Those of the input if None."""
    num_layers: int = 19
    """Double blocks."""
    num_single_layers: int = 38
    """Single blocks."""
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    """Channels of a caption's tokens."""
    pooled_projection_dim: int = 768
    """Channels of the pooled caption; Chroma takes none."""
    guidance_embeds: bool = False
    """Whether the guidance scale is an input."""
    axes_dims_rope: Sequence[int] = field(default=(16, 56, 56), converter=tuple)
    """Channels of a head that tell positions along each axis: none in images, rows, columns."""
    approximator_num_channels: int = 0
    """Inputs of the network that gives Chroma's modulation vectors; 0 in FLUX.1, which has none."""
    approximator_hidden_dim: int = 5120
    approximator_layers: int = 5

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> FluxSettings:
        """Those that a config file holds. Raises ValueError for what no FLUX.1 and no Chroma has."""
        if settings.get("patch_size", 1) != 1:
            raise ValueError(f"patch_size is {settings['patch_size']!r}, and not 1")
        known = {own.name for own in fields(cls)}
        found = {name: value for name, value in settings.items() if name in known}
        if settings.get("_class_name") == "ChromaTransformer2DModel":
            found.setdefault("approximator_num_channels", 64)
        config = cls(**found)
        axes = config.axes_dims_rope
        if len(axes) != 3 or sum(axes) != config.attention_head_dim or any(dim % 2 for dim in axes):
            raise ValueError(f"axes_dims_rope {axes} are not three even parts of {config.attention_head_dim} channels")
        return config

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def is_chroma(self) -> bool:
        """Whether one small network gives the modulation vectors of all blocks."""
        return self.approximator_num_channels > 0

    @property
    def patch_channels(self) -> int:
        """Channels of a token of the output."""
        return self.in_channels if self.out_channels is None else self.out_channels

    @property
    def vectors(self) -> int:
        """Modulation vectors of all blocks and the last layer."""
        double, single = 2 * VECTORS["double"] * self.num_layers, VECTORS["single"] * self.num_single_layers
        return double + single + VECTORS["final"]


def infer_settings(shapes: Shapes) -> dict[str, Any]:
    """Settings from the shapes of tensors in the original layout; raises KeyError with the name of a missing one."""
    width, in_channels = shapes["img_in.weight"]
    head = shapes["double_blocks.0.img_attn.norm.key_norm.scale"][0]
    first = head // 8  # 16, 56, 56 of 128
    settings: dict[str, Any] = {
        "in_channels": in_channels,
        "out_channels": shapes["final_layer.linear.weight"][0],
        "num_layers": count(shapes, "double_blocks.{}."),
        "num_single_layers": count(shapes, "single_blocks.{}."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": [first, (head - first) // 2, (head - first) // 2],
    }
    if "distilled_guidance_layer.in_proj.weight" in shapes:
        hidden, channels = shapes["distilled_guidance_layer.in_proj.weight"]
        return settings | {
            "approximator_num_channels": channels,
            "approximator_hidden_dim": hidden,
            "approximator_layers": count(shapes, "distilled_guidance_layer.layers.{}."),
        }
    return settings | {
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }
