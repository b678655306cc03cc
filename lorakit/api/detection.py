"""What a plugin answers about a checkpoint."""

from __future__ import annotations

from attrs import frozen


@frozen
class DetectedFamily:
    """What a plugin recognises a checkpoint as."""

    name: str | None
    """The family that trains it, as `model.family` names it; None for a base model that the plugin only knows."""
    title: str
    """What it is, in words that fit behind "is": `a Stable Diffusion 1.x model`."""
    advice: str = ""
    """What to do with a model that cannot be trained; empty if nothing helps."""
