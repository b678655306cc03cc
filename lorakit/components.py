"""The bases of everything a user picks by name.

A component is one frozen attrs class. Its fields are its section of the config file, the string under
a field is the field's help, its validators are the checks, and `build` makes the thing. Importing a
component imports nothing heavy: torch and optional packages are imported inside `build`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import field, frozen
from attrs import validators as v

from lorakit.errors import Problem

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from lorakit.engine.observing import Observer, RunInfo
    from lorakit.models.protocol import AdaptationTarget, AttentionBackend, DiffusionModel
    from lorakit.networks.network import Network, ParameterGroup
    from lorakit.networks.saving import Saver


@frozen(kw_only=True)
class Component:
    """Something a user picks by name in a config file."""

    kind: ClassVar[str]
    """What it is, in words: `optimizer`, `network`, …"""
    name: ClassVar[str]
    """What the user writes in the config file."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Optional packages that `build` imports, by the names that pip knows; checked before anything loads."""

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the fields taken together; keys are field names."""
        return iter(())

    def warnings(self) -> Iterator[Problem]:
        """What can be used as it is but has no effect or may not be meant; keys are field names."""
        return iter(())


@frozen(kw_only=True)
class ModelFamilyConfig(Component):
    """A family of base models, and which of its models to train on."""

    kind = "model family"
    parts: ClassVar[tuple[str, ...]] = ("unet", "text_encoder")
    """The parts that adapters can be for."""
    num_timesteps: ClassVar[int] = 1000
    """Timesteps of the noise process."""

    path: str
    """The base model: a `.safetensors` or `.ckpt` file, a diffusers folder, or a Hugging Face Hub id."""

    def build(self, device: torch.device, dtype: torch.dtype) -> DiffusionModel:
        """The model, its weights not read yet: each part is read when it is first asked for."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


@frozen(kw_only=True)
class NetworkConfig(Component):
    """A kind of adapters, and which layers get one."""

    kind = "network"

    parts: tuple[str, ...] = field(default=("unet", "text_encoder"), validator=v.min_len(1))
    """What gets adapters: `unet`, `text_encoder`, or both."""
    weights: Path | None = None
    """A LoRA file to continue from."""

    def build(self, targets: Sequence[AdaptationTarget]) -> Network:
        """The adapters for those of the targets that this network adapts, attached to them."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


@frozen(kw_only=True)
class OptimizerConfig(Component):
    """A rule that turns gradients into updates."""

    kind = "optimizer"

    lr: float = field(default=1e-4, validator=v.ge(0))
    """Learning rate of all parts that have none of their own."""
    unet_lr: float | None = field(default=None, validator=v.optional(v.ge(0)))
    """Learning rate of the U-Net's adapters; `lr` when absent."""
    text_encoder_lr: float | None = field(default=None, validator=v.optional(v.ge(0)))
    """Learning rate of the text encoder's adapters; `lr` when absent. Zero leaves them out."""

    def lr_of(self, part: str) -> float:
        """The learning rate of a part of the model, `unet` or `text_encoder`."""
        own: float | None = getattr(self, f"{part}_lr", None)
        return self.lr if own is None else own

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """The optimizer over the groups, each with its own learning rate."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


@frozen(kw_only=True)
class LRSchedulerConfig(Component):
    """How the learning rate changes over the run, as a factor of the optimizer's learning rate."""

    kind = "LR scheduler"

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The schedule over `total_steps` optimizer steps, all processes counted once."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


@frozen(kw_only=True)
class AttentionConfig(Component):
    """How the denoiser computes softmax(q·kᵀ/√d)·v."""

    kind = "attention backend"

    def build(self) -> AttentionBackend:
        """The function that computes attention."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


@frozen(kw_only=True)
class SaverConfig(Component):
    """The file format of the trained adapters."""

    kind = "saver"

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of the weights in the file."""

    def build(self) -> Saver:
        """The thing that writes and reads this format."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


@frozen(kw_only=True)
class ObserverConfig(Component):
    """Something that is told how the run goes: a log, a progress bar, previews."""

    kind = "observer"

    essential: ClassVar[bool] = False
    """Whether the run stops when this observer fails; others are detached with a warning."""

    def build(self, run_info: RunInfo) -> Observer:
        """The observer of one run; called on the main process only."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")
