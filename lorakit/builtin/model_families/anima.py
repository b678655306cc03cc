"""Anima."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from attrs import field, frozen

from lorakit.api.hookspecs import hookimpl
from lorakit.api.model_family import DetectedFamily, ModelFamilyConfig
from lorakit.api.noise import FlowSpec
from lorakit.checkpoints import CheckpointSummary, ModelPath, is_add_on
from lorakit.models.families.anima.checkpoint import AnimaCheckpoint
from lorakit.models.families.anima.parts import CONDITIONER, LAYOUT, TRANSFORMER
from lorakit.models.families.flow.checkpoint import TRANSFORMER_PREFIXES
from lorakit.models.families.flow.config import FlowTransformerConfig, TokenCounter, path_text
from lorakit.models.families.flow.qwen3 import QWEN3, qwen3_lengths

if TYPE_CHECKING:
    from lorakit.models.families.anima.model import Anima

_MARKS = ("blocks.0.mlp.layer1.weight", "llm_adapter.blocks.0.cross_attn.q_proj.weight")


@frozen(kw_only=True)
class AnimaConfig(FlowTransformerConfig):
    """Anima (CircleStone Labs, 2026), made from Cosmos-Predict2 (NVIDIA, 2025) for anime and illustration."""

    name = "anima"
    title = adapter_title = "Anima"
    parts = (TRANSFORMER, QWEN3, CONDITIONER)
    layout = LAYOUT
    layer_tags = ("transformer", "attention", "mlp", "modulation", "text_encoder")
    lora_layout = "original"
    checkpoint_type = AnimaCheckpoint
    flow = FlowSpec(shift=1.0, preview_shift=3.0, timestep_scale=1.0)
    preview_steps = 30
    preview_scale = 4.0
    tokenizer_fields = ("tokenizer", "t5_tokenizer")
    usual_parts = {  # noqa: RUF012 - a ClassVar of the base
        "text_encoder": 'a file such as "qwen_3_06b_base.safetensors", a folder, or a Hub id such as '
        '"Qwen/Qwen3-0.6B-Base"',
        "text_conditioner": "a transformer file with llm_adapter in it, as Anima's own has, or the folder "
        "text_conditioner of one in diffusers' layout",
        "vae": 'a file such as "qwen_image_vae.safetensors", or a folder',
        "tokenizer": 'the folder tokenizer of an Anima in diffusers\' layout, or a Hub id such as "Qwen/Qwen3-0.6B"',
        "t5_tokenizer": "the folder t5_tokenizer of an Anima in diffusers' layout, or a Hub id such as "
        '"google-t5/t5-small", whose tokenizer is the same',
    }

    text_conditioner: ModelPath | None = field(default=None, converter=path_text)
    """LLM adapter between text encoder and transformer: a file, a diffusers folder, or a Hub id. The model's own when
    absent; single files of the transformer have it."""
    t5_tokenizer: ModelPath | None = field(default=None, converter=path_text)
    """Tokenizer of T5, whose tokens the LLM adapter asks for: a folder with its `tokenizer.json` or `spiece.model`,
    or a Hub id. The model's own when absent; single files have none. T5 itself is not needed."""

    def token_counters(self) -> Iterator[TokenCounter]:
        """Both tokenizers; the caption is cut off by each on its own."""
        from lorakit.models.families.flow.t5 import T5Tokenizer

        yield partial(qwen3_lengths, self.tokenizer_on_disk("tokenizer"), "{}")
        yield T5Tokenizer(self.tokenizer_on_disk("t5_tokenizer"), self.caption_length).lengths

    def model_type(self) -> type[Anima]:
        """The class of the model."""
        from lorakit.models.families.anima.model import Anima

        return Anima


@hookimpl
def register_model_families() -> list[type[ModelFamilyConfig]]:
    """Anima."""
    return [AnimaConfig]


@hookimpl
def detect_model_family(checkpoint: CheckpointSummary) -> DetectedFamily | None:
    """`anima` for a transformer of Cosmos-Predict2 with an LLM adapter."""
    configs, tensors = checkpoint.configs, checkpoint.tensors
    parts = {name: configs.get(name, {}).get("_class_name") for name in ("transformer", CONDITIONER.name)}
    is_folder = parts == {"transformer": "CosmosTransformer3DModel", CONDITIONER.name: "AnimaTextConditioner"}
    is_file = any(all(prefix + mark in tensors for mark in _MARKS) for prefix in TRANSFORMER_PREFIXES)
    if is_folder or (is_file and not is_add_on(checkpoint)):
        return DetectedFamily(AnimaConfig.name, "an Anima model")
    return None
