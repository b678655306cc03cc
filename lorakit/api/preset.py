"""The base class of presets: the settings that `lorakit init --for NAME` writes."""

from __future__ import annotations

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import Component


@frozen(kw_only=True)
class Preset:
    """Usual settings for what a LoRA is trained for."""

    steps: int = field(validator=v.ge(1))
    """About how many steps to train, at batch size 1."""
    rank: int = field(validator=v.ge(1))
    """Rank of the updates."""
    alpha: float = field(validator=v.gt(0))
    """Scale of the updates."""
    text_encoder_share: float = field(validator=v.ge(0))
    """What multiplies the learning rate of the denoiser for text encoders; 0 trains none."""
    word: str = field(validator=v.min_len(1))
    """Words for what is learnt, as captions have them, if the user has none: `photo of fluffy_cat`."""
    prompts: tuple[str, ...] = field(validator=v.min_len(1))
    """What previews draw; `{}` is replaced by the words."""


@frozen(kw_only=True)
class PresetConfig(Component):
    """A preset: what `lorakit init --for NAME` writes. It has no keys."""

    kind = "preset"
    product = "a Preset"

    def build(self) -> Preset:
        """The settings."""
        raise NotImplementedError(f"{type(self).__name__} has no method build")

    @classmethod
    def is_product(cls, made: object) -> bool:
        """Whether `build` returned a `Preset`."""
        return isinstance(made, Preset)
