"""The presets that come with lorakit."""

from __future__ import annotations

from attrs import frozen

from lorakit.api.hookspecs import hookimpl
from lorakit.api.preset import Preset, PresetConfig


@frozen(kw_only=True)
class SubjectPreset(PresetConfig):
    """A thing, an animal or a character: rank 16, 2000 steps."""

    name = "subject"

    def build(self) -> Preset:
        """A medium rank, and the text encoder at half the rate."""
        return Preset(
            steps=2000,
            rank=16,
            alpha=16.0,
            text_encoder_share=0.5,
            word="photo of fluffy_cat",
            prompts=("{}", "{} on a beach", "{}, oil painting"),
        )


@frozen(kw_only=True)
class PersonPreset(PresetConfig):
    """A person: rank 32 with alpha 16, 2000 steps."""

    name = "person"

    def build(self) -> Preset:
        """A higher rank for a face's details, whose updates are halved."""
        return Preset(
            steps=2000,
            rank=32,
            alpha=16.0,
            text_encoder_share=0.5,
            word="photo of jane_doe",
            prompts=("{}", "{}, portrait, smiling", "{} walking in a city"),
        )


@frozen(kw_only=True)
class StylePreset(PresetConfig):
    """A style: rank 32 with alpha 16, 3000 steps, the text encoder at a quarter of the rate."""

    name = "style"

    def build(self) -> Preset:
        """More steps, as a style is in every picture and in no word."""
        return Preset(
            steps=3000,
            rank=32,
            alpha=16.0,
            text_encoder_share=0.25,
            word="in my_style",
            prompts=("a castle on a hill {}", "a portrait of a woman {}", "a cat {}"),
        )


@hookimpl
def register_presets() -> list[type[PresetConfig]]:
    """Subject, person and style."""
    return [SubjectPreset, PersonPreset, StylePreset]
