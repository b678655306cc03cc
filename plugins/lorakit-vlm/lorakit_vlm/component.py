"""The captioner `vlm`: its options."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from attrs import field, frozen
from attrs import validators as v

from lorakit.api import Captioner, CaptionerConfig, ModelError, Problem, hookimpl, locate


@frozen(kw_only=True)
class VLMConfig(CaptionerConfig):
    """Sentences, by any vision-language model of transformers, such as LLaVA, Qwen-VL, SmolVLM, BLIP or Florence-2."""

    name = "vlm"
    requires = ("transformers",)

    model: str
    """Folder with the model as transformers saves it, or a Hub id such as `HuggingFaceTB/SmolVLM-Instruct`."""
    prompt: str = "Describe this image in one or two sentences."
    """What the model is asked, or for models that are not asked, how captions begin; may be empty for these."""
    max_new_tokens: int = field(default=120, validator=v.ge(1))
    """Tokens after which a caption is cut off."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights; by default that of the files, and float32 on the CPU."""

    def problems(self) -> Iterator[Problem]:
        """A model that is nowhere, or that transformers did not save."""
        hint = "give a folder that transformers saved, or a Hub id such as HuggingFaceTB/SmolVLM-Instruct"
        try:
            location = locate(self.model, Path())
        except ModelError:
            yield Problem("model", f"{Path(self.model).absolute()} does not exist", hint)
            return
        if isinstance(location, Path) and not (location / "config.json").is_file():
            yield Problem("model", f"{location} has no config.json", hint)

    def build(self, device: str) -> Captioner:
        """The model and its processor, on the device."""
        from lorakit_vlm.model import VisionLanguageModel

        return VisionLanguageModel(self, device)


@hookimpl
def register_captioners() -> list[type[CaptionerConfig]]:
    """Vision-language models."""
    return [VLMConfig]
