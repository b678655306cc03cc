"""Attention of the U-Net, computed by whatever backend was chosen.

B images, n tokens of the image, m tokens of the caption or the image, d channels per head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from lorakit.models.protocol import AttentionBackend

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


class BackendProcessor:
    """Projects queries, keys and values, and leaves the rest to an attention backend.

    It stands in for the processor of diffusers' `Attention` modules in a U-Net, without the checks for
    features that the U-Nets of Stable Diffusion have not.
    """

    def __init__(self, backend: AttentionBackend) -> None:
        self.backend = backend

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        """Self-attention of image tokens [B, n, c], or cross-attention to caption tokens [B, m, c']; [B, n, c]."""
        if attention_mask is not None:
            raise ValueError("the U-Net's attention takes no mask")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        dtype = query.dtype
        if attn.upcast_attention:
            query, key, value = query.float(), key.float(), value.float()
        heads = (attn.heads, -1)
        mixed = self.backend(*(tensor.unflatten(-1, heads).transpose(1, 2) for tensor in (query, key, value)))
        out: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2).to(dtype))
        return out


def use_backend(unet: nn.Module, backend: AttentionBackend) -> None:
    """Let a backend compute all attention of a U-Net."""
    unet.set_attn_processor(BackendProcessor(backend))  # type: ignore[operator]
