"""FLUX.1 and Chroma."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from lorakit.api.hookspecs import hookimpl
from lorakit.api.model_family import DetectedFamily, ModelFamilyConfig
from lorakit.api.noise import FlowSpec, ShiftLine
from lorakit.checkpoints import CheckpointSummary, ModelPath, is_add_on
from lorakit.errors import ModelError, Problem
from lorakit.models.families.flow.checkpoint import TRANSFORMER, TRANSFORMER_PREFIXES, FlowCheckpoint
from lorakit.models.families.flow.config import MAX_TOKENS, path_text
from lorakit.models.families.flux1.checkpoint import CHROMA, FAMILY, ChromaCheckpoint, FluxCheckpoint
from lorakit.models.families.flux1.config import SCHNELL_TOKENS, FluxFamilyConfig
from lorakit.models.families.flux1.parts import CLIP, T5, T5_ALONE
from lorakit.models.families.flux1.parts import TRANSFORMER as TRANSFORMER_PART

if TYPE_CHECKING:
    from lorakit.models.families.flow.model import FlowTransformer

_IN_CHANNELS = 64
"""Channels of a patch of noisy latents; models that take more than that have another purpose."""
_PURPOSES: Mapping[int, str] = {128: "depth or canny", 384: "fill"}
_PLAIN = "train on FLUX.1 dev; the LoRA works with this model, too"
_T5_FILE = 'a file such as "t5xxl_fp16.safetensors", a folder, or a Hub id'
_T5_TOKENIZER = (
    'the folder {} of a model in diffusers\' layout, or a Hub id such as "google/t5-v1_1-xxl"; single files have none'
)
_VAE = 'a file such as "ae.safetensors", or a folder'


@frozen(kw_only=True)
class FluxConfig(FluxFamilyConfig):
    """FLUX.1 dev and schnell, and models with their structure, such as FLUX.1 Krea and Kontext."""

    name = "flux1"
    title = adapter_title = FAMILY
    parts = (TRANSFORMER_PART, CLIP, T5)
    checkpoint_type = FluxCheckpoint
    t5_tokenizer = "tokenizer_2"
    tokenizer_fields = ("tokenizer", "tokenizer_2")
    flow = FlowSpec(shift=ShiftLine(), preview_shift=ShiftLine())
    preview_scale = 1.0
    usual_parts = {  # noqa: RUF012 - a ClassVar of the base
        "text_encoder": 'a file such as "clip_l.safetensors", a folder, or a Hub id',
        "text_encoder_2": _T5_FILE,
        "tokenizer": "the folder tokenizer of a model in diffusers' layout",
        "tokenizer_2": _T5_TOKENIZER.format("tokenizer_2"),
        "vae": _VAE,
    }

    text_encoder: ModelPath | None = field(default=None, converter=path_text)
    """First text encoder, CLIP ViT-L: a file, a folder, or a Hub id. The model's own when absent."""
    text_encoder_2: ModelPath | None = field(default=None, converter=path_text)
    """Second text encoder, T5-XXL: a file, a folder, or a Hub id. The model's own when absent."""
    tokenizer: ModelPath | None = field(default=None, converter=path_text)
    """Tokenizer of CLIP: a folder, or a Hub id. When absent, the model's own, or for single files that of CLIP, which
    comes with lorakit."""
    tokenizer_2: ModelPath | None = field(default=None, converter=path_text)
    """Tokenizer of T5: a folder with its `tokenizer.json` or `spiece.model`, or a Hub id. The model's own when absent;
    single files have none."""

    @property
    def noise_process(self) -> FlowSpec:
        """Flow matching, shifted by the resolution; not for schnell."""
        return self.flow if self.has_guidance else FlowSpec()

    @property
    def preview_steps(self) -> int:  # type: ignore[override]
        """28, or the 4 that schnell is made for."""
        return 28 if self.has_guidance else 4

    @property
    def preview_guidance(self) -> float | None:  # type: ignore[override]
        """3.5, or none for schnell."""
        return 3.5 if self.has_guidance else None

    @property
    def caption_length(self) -> int:
        """Maximum caption length in tokens."""
        return self.max_token_length or (MAX_TOKENS if self.has_guidance else SCHNELL_TOKENS)

    @cached_property
    def has_guidance(self) -> bool:
        """Whether the transformer takes a guidance scale, as that of dev does and that of schnell does not."""
        try:
            summary = self.stored.summary
        except ModelError:
            return True  # `problems` says it
        if summary.kind == "folder":
            config = summary.configs.get(TRANSFORMER) or summary.configs.get("config", {})
            return bool(config.get("guidance_embeds"))
        return any("guidance_in." in name or "guidance_embedder." in name for name in summary.tensors)

    def warnings(self) -> Iterator[Problem]:
        """A model that plain training takes its speed from; keys are field names."""
        yield from super().warnings()
        if not self.has_guidance and self.training_adapter is None:
            message = (
                f"{self.path} is FLUX.1 schnell, distilled to four steps, which training destroys: images become soft"
            )
            hint = (
                "train on FLUX.1 dev, or set model.training_adapter to a LoRA that undoes the distillation, such as "
                "ostris/FLUX.1-schnell-training-adapter"
            )
            yield Problem("path", message, hint)

    def _problems_of_tokenizers(self, stored: FlowCheckpoint) -> Iterator[Problem]:
        for problem in super()._problems_of_tokenizers(stored):
            # CLIP's comes with lorakit.
            if problem.key != "tokenizer" or self.tokenizer is not None:
                yield problem

    def model_type(self) -> type[FlowTransformer]:
        """The class of the model."""
        from lorakit.models.families.flux1.model import Flux

        return Flux


@frozen(kw_only=True)
class ChromaConfig(FluxFamilyConfig):
    """Chroma, a FLUX.1 schnell without its guidance layers, trained further; it needs no CLIP."""

    name = "chroma"
    title = adapter_title = CHROMA
    parts = (TRANSFORMER_PART, T5_ALONE)
    checkpoint_type = ChromaCheckpoint
    t5_tokenizer = "tokenizer"
    flow = FlowSpec()
    preview_steps = 35
    preview_scale = 5.0
    usual_parts = {  # noqa: RUF012 - a ClassVar of the base
        "text_encoder": _T5_FILE,
        "tokenizer": _T5_TOKENIZER.format("tokenizer"),
        "vae": _VAE,
    }

    def model_type(self) -> type[FlowTransformer]:
        """The class of the model."""
        from lorakit.models.families.flux1.model import Chroma

        return Chroma


@hookimpl
def register_model_families() -> list[type[ModelFamilyConfig]]:
    """FLUX.1 and Chroma."""
    return [FluxConfig, ChromaConfig]


@hookimpl
def detect_model_family(checkpoint: CheckpointSummary) -> DetectedFamily | None:
    """`flux1` or `chroma` for a transformer of double and single blocks that takes noisy latents and nothing else."""
    return _of_folder(checkpoint.configs) if checkpoint.kind == "folder" else _of_file(checkpoint)


def _of_folder(configs: Mapping[str, Mapping[str, Any]]) -> DetectedFamily | None:
    config = configs.get("transformer") or configs.get("config", {})
    name = config.get("_class_name")
    if name not in {"FluxTransformer2DModel", "ChromaTransformer2DModel"}:
        return None
    return _family(
        name == "ChromaTransformer2DModel", config.get("in_channels", 64), bool(config.get("guidance_embeds"))
    )


def _of_file(checkpoint: CheckpointSummary) -> DetectedFamily | None:
    names = checkpoint.tensors
    for prefix in TRANSFORMER_PREFIXES:
        blocks = (
            f"{prefix}double_blocks.0.img_attn.qkv.weight",
            f"{prefix}single_transformer_blocks.0.proj_mlp.weight",
        )
        shape = names.get(f"{prefix}img_in.weight") or names.get(f"{prefix}x_embedder.weight", ())
        if not any(own in names for own in blocks) or is_add_on(checkpoint):
            continue
        if f"{prefix}double_stream_modulation_img.lin.weight" in names:
            return None  # FLUX.2
        is_chroma = f"{prefix}distilled_guidance_layer.in_proj.weight" in names
        if len(shape) != 2:
            return DetectedFamily(None, "a Chroma Radiance model, which works on pixels") if is_chroma else None
        guidance = ("guidance_in.in_layer.weight", "time_text_embed.guidance_embedder.linear_1.weight")
        return _family(is_chroma, shape[1], any(f"{prefix}{own}" in names for own in guidance))
    return None


def _family(is_chroma: bool, in_channels: int, has_guidance: bool) -> DetectedFamily:
    """What a model with such a transformer is."""
    if in_channels != _IN_CHANNELS:
        purpose = _PURPOSES.get(in_channels, "special")
        return DetectedFamily(None, f"a FLUX.1 {purpose} model, whose input has more than noisy latents", _PLAIN)
    if is_chroma:
        return DetectedFamily(ChromaConfig.name, "a Chroma model")
    return DetectedFamily(FluxConfig.name, f"a FLUX.1 {'dev' if has_guidance else 'schnell'} model")
