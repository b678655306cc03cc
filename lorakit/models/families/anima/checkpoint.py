"""Where the parts of an Anima are stored, in the layouts of diffusers and of the original code. Imports no torch."""

from __future__ import annotations

from attrs import frozen

from lorakit.checkpoints import HubModel, Shapes
from lorakit.errors import ModelError
from lorakit.models.families.anima.parts import CONDITIONER, TRANSFORMER, original_name
from lorakit.models.families.anima.structure import (
    ConditionerConfig,
    TransformerConfig,
    conditioner_shapes,
    infer_conditioner,
    infer_transformer,
    transformer_shapes,
)
from lorakit.models.families.flow.checkpoint import LATENT_CHANNELS, TRANSFORMER_PREFIXES, FlowCheckpoint
from lorakit.models.families.flow.qwen3 import QWEN3, qwen3_format
from lorakit.models.qwen_image_vae_files import qwen_image_vae_format
from lorakit.models.weights.checkpoint import DIFFUSERS_FILES, PartFormat, Places

FAMILY = "Anima"
"""What messages call the family."""
_LLM_ADAPTER = "llm_adapter."
_ORIGINAL_ROOTS = ("x_embedder.", "t_embedder.", "t_embedding_norm.", "blocks.", "final_layer.")
_DIFFUSERS_ROOTS = ("patch_embed.", "time_embed.", "transformer_blocks.", "norm_out.", "proj_out.")


def _arranged(places: Places, shapes: Shapes) -> tuple[Places, Shapes]:
    """Places and shapes of a transformer by the original names, which its module has.

    States of NVIDIA's layers, which some files hold, mean nothing outside of them.
    """
    names = {bare: original_name(bare) for bare in places if not bare.endswith("._extra_state")}
    return {name: places[bare] for bare, name in names.items()}, {name: shapes[bare] for bare, name in names.items()}


@frozen
class AnimaCheckpoint(FlowCheckpoint):
    """An Anima in a diffusers folder, or in files for transformer with LLM adapter, text encoder and VAE."""

    channels_setting = ("z_dim", 16)
    formats = {  # noqa: RUF012 - a ClassVar of the base
        TRANSFORMER.name: PartFormat(
            name=TRANSFORMER.name,
            title=TRANSFORMER.title,
            family=FAMILY,
            files=DIFFUSERS_FILES,
            prefix=TRANSFORMER_PREFIXES[0],
            other_prefixes=TRANSFORMER_PREFIXES[1:],
            roots=(*_ORIGINAL_ROOTS, *_DIFFUSERS_ROOTS),
            infer=infer_transformer,
            shapes=transformer_shapes,
            arrange=_arranged,
        ),
        CONDITIONER.name: PartFormat(
            name=CONDITIONER.name,
            title=CONDITIONER.title,
            family=FAMILY,
            files=DIFFUSERS_FILES,
            prefix=TRANSFORMER_PREFIXES[0] + _LLM_ADAPTER,
            other_prefixes=tuple(prefix + _LLM_ADAPTER for prefix in TRANSFORMER_PREFIXES[1:]),
            roots=("embed.", "in_proj.", "blocks.", "out_proj.", "norm."),
            infer=infer_conditioner,
            shapes=conditioner_shapes,
        ),
        QWEN3.name: qwen3_format(FAMILY, "text_encoders.qwen3_06b.transformer."),
        "vae": qwen_image_vae_format(FAMILY),
    }

    def check_part(self, name: str) -> None:
        """A `ModelError` unless a part is there, whole, and fits the others; one on the Hub passes."""
        super().check_part(name)
        if name == CONDITIONER.name and not any(
            isinstance(self.separate.get(other, self.location), HubModel) for other in self.formats
        ):
            self._check_widths()

    def _check_widths(self) -> None:
        """A `ModelError` if the LLM adapter is for another text encoder or transformer."""
        part = self.part(CONDITIONER.name)
        config = ConditionerConfig.of(part.settings)
        reader, read = self.part(TRANSFORMER.name), self.part(QWEN3.name)
        wanted = TransformerConfig.of(reader.settings)
        for other, width, own in (
            (read, read.settings["hidden_size"], config.source_dim),
            (reader, wanted.text_embed_dim, config.target_dim),
        ):
            if width != own:
                raise ModelError(f"{other} has captions of {width} channels, and {part} those of {own}")
        if wanted.in_channels != LATENT_CHANNELS or wanted.out_channels != LATENT_CHANNELS:
            raise ModelError(f"{reader} is for latents of {wanted.in_channels} channels, not {LATENT_CHANNELS}")
