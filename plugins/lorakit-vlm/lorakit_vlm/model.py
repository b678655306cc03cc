"""The model and what is written to it: images and a prompt to captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from lorakit.api import ModelError, locate
from lorakit_vlm.component import VLMConfig


class VisionLanguageModel:
    """A model of transformers that answers a prompt about each image, always with the likeliest next token."""

    def __init__(self, config: VLMConfig, device: str) -> None:
        """Read the model onto a device. Raises ModelError where it cannot be read."""
        self._config = config
        place = _device(device)
        dtype = config.dtype if config.dtype != "auto" or place.type != "cpu" else "float32"
        location = locate(config.model, Path())
        name = str(location)
        try:
            self._processor: Any = AutoProcessor.from_pretrained(name)  # type: ignore[no-untyped-call]
            model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{name} cannot be read as a vision-language model: {reason}") from error
        self._model = model.to(place).eval()
        tokenizer = getattr(self._processor, "tokenizer", None)
        # Captions continue what is last in a row, which padding behind it would be.
        if tokenizer is not None and not model.config.is_encoder_decoder:
            tokenizer.padding_side = "left"
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    @torch.inference_mode()
    def caption(self, images: Sequence[Image]) -> list[str]:
        """What the model answers."""
        inputs = self._inputs(images).to(self._model.device, self._model.dtype)
        made = self._model.generate(**inputs, max_new_tokens=self._config.max_new_tokens, do_sample=False)
        asked = inputs.get("input_ids")
        # Decoders give the prompt with the answer; models that only continue a caption's beginning keep that.
        if self._is_asked and asked is not None and torch.equal(made[:, : asked.shape[1]], asked):
            made = made[:, asked.shape[1] :]
        captions: list[str] = self._processor.batch_decode(made, skip_special_tokens=True)
        return captions

    @property
    def _is_asked(self) -> bool:
        """Whether the model answers in a chat."""
        return bool(getattr(self._processor, "chat_template", None))

    def _inputs(self, images: Sequence[Image]) -> Any:
        """The images with the prompt as the model takes them."""
        padding = {"padding": True}
        if not self._is_asked:
            text = {"text": [self._config.prompt] * len(images)} if self._config.prompt else {}
            return self._processor(images=list(images), **text, **padding, return_tensors="pt")
        question = {"type": "text", "text": self._config.prompt}
        chats = [[{"role": "user", "content": [{"type": "image", "image": image}, question]}] for image in images]
        return self._processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs=padding,
        )  # fmt: skip


def _device(name: str) -> torch.device:
    """The device of a name. Raises ModelError where PyTorch has none of that name."""
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device {name!r} cannot be used: {error}") from error
    return device
