"""What tells one U-Net of Stable Diffusion from another, in the words of diffusers' configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import field, fields, frozen

_MUST_BE_OFF = (
    "center_input_sample", "only_cross_attention", "reverse_transformer_layers_per_block", "encoder_hid_dim",
    "encoder_hid_dim_type", "num_attention_heads", "dual_cross_attention", "class_embed_type", "num_class_embeds",
    "time_embedding_dim", "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim", "class_embeddings_concat",
)  # fmt: skip
_MUST_BE: Mapping[str, tuple[object, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": ("text_time", None),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
}
_ATTENDS_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_ATTENDS_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


@frozen(kw_only=True)
class Level:
    """One size of the image, on the way down and on the way up."""

    channels: int
    above: int
    """Channels of the next larger level; at the top its own."""
    below: int
    """Channels of the next smaller level; at the bottom its own."""
    is_top: bool
    is_bottom: bool
    layers: int
    """ResNet blocks on the way down; on the way up there is one more."""
    attends_down: bool
    """Whether there is a transformer behind each of them on the way down."""
    attends_up: bool
    """Whether there is one behind each of them on the way up."""
    depth: int
    """Transformer blocks in each transformer."""
    heads: int
    """Heads of their attention."""
    context_channels: int
    """Channels of the caption that they look at."""


@frozen(kw_only=True)
class UNetConfig:
    """Settings of a U-Net; where they are absent, they are diffusers' defaults."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: Sequence[int] = (320, 640, 1280, 1280)
    """Channels of each level, the largest image first."""
    down_block_types: Sequence[str] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: Sequence[str] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
    layers_per_block: int | Sequence[int] = 2
    transformer_layers_per_block: int | Sequence[int] = 1
    attention_head_dim: int | Sequence[int] = 8
    """Heads of the attention, whatever the name says; it is diffusers' mistake, and in all configs."""
    cross_attention_dim: int | Sequence[int] = 1280
    use_linear_projection: bool = field(default=False, converter=bool)
    upcast_attention: bool = field(default=False, converter=bool)
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = field(default=True, converter=bool)
    freq_shift: float = 0
    addition_embed_type: str | None = None
    """`text_time` in SDXL, whose time embedding also has the pooled caption and the image's sizes."""
    addition_time_embed_dim: int | None = None
    """Channels of the embedding of each size; 256 in all models."""
    projection_class_embeddings_input_dim: int | None = None
    """Channels of the pooled caption and the sizes' embeddings together."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> UNetConfig:
        """Those among some settings that make a difference for Stable Diffusion.

        Raises ValueError for one that would make a difference and that none of these models has.
        """
        for name, value in settings.items():
            if (name in _MUST_BE_OFF and value) or value not in _MUST_BE.get(name, (value,)):
                raise ValueError(f"{name} is {value!r}, which it is in no Stable Diffusion")
        names = {own.name for own in fields(cls)}
        found = cls(**{name: value for name, value in settings.items() if name in names})
        if found.addition_embed_type and not found.added_channels:
            raise ValueError("projection_class_embeddings_input_dim is missing")
        return found

    @property
    def time_channels(self) -> int:
        """Channels of the time embedding."""
        return 4 * self.block_out_channels[0]

    @property
    def added_channels(self) -> int:
        """Channels of the pooled caption and the embeddings of sizes together; 0 where the U-Net takes none."""
        return (self.projection_class_embeddings_input_dim or 0) if self.addition_embed_type else 0

    @property
    def levels(self) -> list[Level]:
        """The levels, the largest image first. Raises ValueError where some settings are not for all of them."""
        channels = self._for_each_level("block_out_channels")
        layers, depths = self._for_each_level("layers_per_block"), self._for_each_level("transformer_layers_per_block")
        heads, contexts = self._for_each_level("attention_head_dim"), self._for_each_level("cross_attention_dim")
        down, up = self._for_each_level("down_block_types"), self._for_each_level("up_block_types")
        bottom = len(channels) - 1
        return [
            Level(
                channels=channels[index],
                above=channels[max(index - 1, 0)],
                below=channels[min(index + 1, bottom)],
                is_top=index == 0,
                is_bottom=index == bottom,
                layers=layers[index],
                attends_down=_attends(_ATTENDS_DOWN, down[index]),
                attends_up=_attends(_ATTENDS_UP, up[bottom - index]),
                depth=depths[index],
                heads=heads[index],
                context_channels=contexts[index],
            )
            for index in range(bottom + 1)
        ]

    def _for_each_level(self, name: str) -> Sequence[Any]:
        """A setting as it is at each level, which it may be at all."""
        value, count = getattr(self, name), len(self.block_out_channels)
        if isinstance(value, int):
            return [value] * count
        if len(value) != count:
            raise ValueError(f"{name} has {len(value)} entries, but block_out_channels {count}")
        return list(value)


def _attends(kinds: Mapping[str, bool], kind: str) -> bool:
    """Whether a kind of block has transformers."""
    if kind not in kinds:
        raise ValueError(f"there are blocks {kind!r}, which no Stable Diffusion has")
    return kinds[kind]
