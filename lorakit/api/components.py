"""The bases of everything a user picks by name.

A component is one frozen attrs class. Its fields are its section of the config file, the string under
a field is the field's help, its validators are the checks, and `build` makes the thing. Importing a
component imports nothing heavy: torch and optional packages are imported inside `build`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from attrs import field, fields, frozen
from attrs import validators as v

from lorakit.api.block_layout import BlockLayout
from lorakit.api.noise import DDPMSpec, NoiseSpec
from lorakit.errors import Problem

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from lorakit.api.observer import Observer, RunInfo
    from lorakit.config.train_config import TrainConfig
    from lorakit.models.interfaces import AdaptationTarget, AttentionBackend, DiffusionModel
    from lorakit.networks.adapter_file import Saver
    from lorakit.networks.network import Network, ParameterGroup

ComponentT = TypeVar("ComponentT", bound="Component")


@frozen(kw_only=True)
class Component:
    """Something a user picks by name in a config file."""

    kind: ClassVar[str]
    """What it is, in words: `optimizer`, `network`, …"""
    name: ClassVar[str]
    """What the user writes in the config file."""
    name_key: ClassVar[str] = "name"
    """The key that the name is written under."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Optional packages that `build` imports, by the names that pip knows; checked before anything loads."""
    product: ClassVar[str] = "something"
    """What `build` should return, in words: `a torch.optim.Optimizer`."""
    takes_import_path: ClassVar[bool] = False
    """Whether it stands for classes of any package: the user writes a dotted path in place of its name."""

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the fields taken together; keys are field names."""
        return iter(())

    def warnings(self) -> Iterator[Problem]:
        """What can be used as it is but has no effect or may not be meant; keys are field names."""
        return iter(())

    def problems_with(self, config: TrainConfig) -> Iterator[Problem]:  # noqa: ARG002
        """What is wrong with the fields in a run of this config; keys are field names."""
        return iter(())

    def warnings_with(self, config: TrainConfig) -> Iterator[Problem]:  # noqa: ARG002
        """What has no effect, or may not be meant, in a run of this config; keys are field names."""
        return iter(())

    @classmethod
    def is_product(cls, made: object) -> bool:  # noqa: ARG003
        """Whether something that `build` returned can be used."""
        return True

    def warnings_of_length(self, total_steps: int) -> Iterator[Problem]:  # noqa: ARG002
        """What may not be meant in a run of `total_steps` optimizer steps; keys are field names."""
        return iter(())


def _has_methods(cls: type, *names: str) -> bool:
    return all(callable(getattr(cls, name, None)) for name in names)


def with_import_path(component: type[ComponentT], path: str) -> type[ComponentT]:
    """A component with a dotted path as its name, where it is `takes_import_path`; any other as it is."""
    found: type[ComponentT] = _at(component, path) if component.takes_import_path else component  # type: ignore[arg-type]
    return found


@cache
def _at(component: Any, path: str) -> Any:
    own = {"name": path, "__doc__": f"`{path}`, a class of another package.", "__module__": component.__module__}
    return frozen(kw_only=True)(type(component.__name__, (component,), own))


@frozen(kw_only=True)
class ModelFamilyConfig(Component):
    """A family of base models, and which of its models to train on."""

    kind = "model family"
    name_key = "family"
    product = "a DiffusionModel"
    parts: ClassVar[tuple[str, ...]] = ("unet", "text_encoder")
    """The parts that adapters can be for."""
    text_encoders: ClassVar[int] = 1
    """How many text encoders its models have."""
    layout: ClassVar[BlockLayout | None] = None
    """How the blocks of its U-Net are numbered; None where they cannot be told apart."""
    title: ClassVar[str] = ""
    """What people call it, such as `Stable Diffusion 1.x`; its name when empty."""
    supports_weighted_captions: ClassVar[bool] = True
    """Whether its text encoders can weight words of captions, as `data.weighted_captions` asks for."""
    size_multiple: ClassVar[int] = 8
    """What the sides of images are multiples of, in pixels."""
    preview_size: ClassVar[int] = 512
    """The sides of previews that say no size, in pixels."""

    path: str
    """The base model: a `.safetensors` or `.ckpt` file, a diffusers folder, or a Hugging Face Hub id."""

    @property
    def noise_process(self) -> NoiseSpec:
        """The kind of its noise process, as far as that is known before the model's files are read."""
        return DDPMSpec()

    def warnings_of_captions(self, captions: Mapping[str, str], weighted: bool) -> Iterator[Problem]:  # noqa: ARG002
        """What may not be meant with captions, by the names of their images; keys are field names. Imports no torch.

        With `weighted`, brackets in captions say how much words count.
        """
        return iter(())

    @classmethod
    def is_product(cls, made: object) -> bool:
        """Whether it is a DiffusionModel."""
        # Of the class, because asking a model itself for a part would load that part.
        return _has_methods(type(made), "predict", "targets", "fingerprint", "free")

    def build(self, device: torch.device, dtype: torch.dtype) -> DiffusionModel:
        """The model, its weights not read yet: each part is read when it is first asked for."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


@frozen(kw_only=True)
class NetworkConfig(Component):
    """A kind of adapters, and which layers get one."""

    kind = "network"
    product = "a Network"

    parts: tuple[str, ...] = field(default=("unet", "text_encoder"), validator=v.min_len(1))
    """What gets adapters: `unet`, `text_encoder`, or both."""
    weights: Path | None = None
    """A LoRA file to start from, of lorakit, sd-scripts, diffusers or PEFT."""

    def metadata(self) -> Mapping[str, object]:
        """What files say of the network, in keys that tools read, such as `ss_network_module` and `ss_network_dim`."""
        return {"ss_network_module": self.name}

    @classmethod
    def is_product(cls, made: object) -> bool:
        """Whether it is a Network."""
        return _has_methods(type(made), "initialize", "parameter_groups", "load_tensors", "begin_batch")

    def build(self, targets: Sequence[AdaptationTarget]) -> Network:
        """The adapters for those of the targets that this network adapts, attached to them."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


def _rates(_: object, __: object, value: float | tuple[float, ...] | None) -> None:
    rates = value if isinstance(value, tuple) else (value,)
    if not rates:
        raise ValueError("must not be empty")
    if any(rate is not None and rate < 0 for rate in rates):
        raise ValueError(f"must be at least 0, not {min(rate for rate in rates if rate is not None):g}")


@frozen(kw_only=True)
class OptimizerConfig(Component):
    """A rule that turns gradients into updates."""

    kind = "optimizer"
    product = "a torch.optim.Optimizer"

    supports_group_lrs: ClassVar[bool] = True
    """Whether parts of the model may have different learning rates, 0 apart, which leaves a part out."""
    schedule_free: ClassVar[bool] = False
    """Whether it does without an LR schedule, so that any but a constant one is warned of."""
    finds_learning_rate: ClassVar[bool] = False
    """Whether it finds the learning rate itself and multiplies it by `lr`, which is then about 1."""
    usual_lr: ClassVar[float | None] = None
    """The learning rate to start from, which `lorakit init` writes, and a hundred times of which is warned of."""

    lr: float = field(default=1e-4, validator=v.ge(0))
    """Learning rate of all parts that have none of their own."""
    unet_lr: float | None = field(default=None, validator=v.optional(v.ge(0)))
    """Learning rate of the U-Net's adapters; `lr` when absent."""
    text_encoder_lr: tuple[float, ...] | float | None = field(default=None, validator=_rates)
    """Learning rate of the text encoder's adapters; `lr` when absent. Zero leaves them out. For a model with several
    text encoders, a list with one number for each."""

    @property
    def supports_lr_multipliers(self) -> bool:
        """Whether a network may give some of its parameters a multiple of their part's learning rate."""
        return self.supports_group_lrs

    def lrs_for(self, part: str) -> tuple[float, ...]:
        """The learning rates of a part of the model, `unet` or `text_encoder`: one, or one for each text encoder."""
        own: float | tuple[float, ...] | None = getattr(self, f"{part}_lr", None)
        if isinstance(own, tuple):
            return own
        return (self.lr if own is None else own,)

    def lr_for(self, part: str, text_encoder: int = 0) -> float:
        """The learning rate of a part of the model, or of one of its text encoders, counted from 0."""
        rates = self.lrs_for(part)
        return rates[text_encoder] if len(rates) > 1 else rates[0]

    def extra_options(self) -> dict[str, Any]:
        """The values of the fields that this optimizer adds to those of every optimizer, by name."""
        shared = {own.name for own in fields(OptimizerConfig)}
        return {own.name: getattr(self, own.name) for own in fields(type(self)) if own.name not in shared}

    def problems(self) -> Iterator[Problem]:
        """Says so if the parts' learning rates differ where only one can be had."""
        rates = {f"{part}_lr": set(self.lrs_for(part)) - {0} for part in ("unet", "text_encoder")}
        if self.supports_group_lrs or len(set().union(*rates.values())) < 2:
            return
        for key, own in rates.items():
            for rate in own - {self.lr}:
                hint = f"leave it out, or set {key} = 0 to leave this part out"
                yield Problem(key, f"must be lr, {self.lr:g}, with {self.name}, not {rate:g}", hint)

    def check_lrs(self, rates: Sequence[float]) -> Iterator[Problem]:
        """What is wrong with the learning rates that a network asks for; keys are full."""
        different = {rate for rate in rates if rate > 0}
        if len(different) > 1 and not self.supports_group_lrs:
            message = f"{self.name} has one learning rate for all layers, but the network asks for {len(different)}"
            yield Problem("optimizer.name", message, "choose another, or leave out what gives layers their own")

    @classmethod
    def is_product(cls, made: object) -> bool:
        """Whether it is a torch.optim.Optimizer."""
        from torch.optim import Optimizer

        return isinstance(made, Optimizer)

    def build(self, groups: Sequence[ParameterGroup]) -> Optimizer:
        """The optimizer over the groups, each with its own learning rate."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


@frozen(kw_only=True)
class LRSchedulerConfig(Component):
    """How the learning rate changes over the run, as a factor of the optimizer's learning rate."""

    kind = "LR scheduler"
    product = "an LRScheduler of torch.optim.lr_scheduler"

    is_constant: ClassVar[bool] = False
    """Whether the learning rate stays the same over the whole run."""

    @classmethod
    def is_product(cls, made: object) -> bool:
        """Whether it is an LRScheduler of torch.optim.lr_scheduler."""
        from torch.optim.lr_scheduler import LRScheduler

        return isinstance(made, LRScheduler)

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The schedule over `total_steps` optimizer steps, all processes counted once."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


@frozen(kw_only=True)
class AttentionConfig(Component):
    """How the denoiser computes softmax(q·kᵀ/√d)·v."""

    kind = "attention backend"
    product = "a function"

    @classmethod
    def is_product(cls, made: object) -> bool:
        """Whether it is a function."""
        return callable(made)

    def build(self) -> AttentionBackend:
        """The function that computes attention."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


@frozen(kw_only=True)
class SaverConfig(Component):
    """The file format of the trained adapters."""

    kind = "saver"
    product = "a Saver, with save, load and a suffix such as '.safetensors'"

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of the weights in the file."""

    @classmethod
    def is_product(cls, made: object) -> bool:
        """Whether it is a Saver, with save, load and a suffix such as '.safetensors'."""
        suffix = getattr(made, "suffix", None)
        is_suffix = isinstance(suffix, str) and suffix.startswith(".")
        return is_suffix and _has_methods(type(made), "save", "load")

    def build(self) -> Saver:
        """The thing that writes and reads this format."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


@frozen(kw_only=True)
class ObserverConfig(Component):
    """Something that is told how the run goes: a log, a progress bar, previews."""

    kind = "observer"
    product = "an Observer"

    essential: ClassVar[bool] = False
    """Whether the run stops when this observer fails; others are detached with a warning."""

    @classmethod
    def is_product(cls, made: object) -> bool:
        """Whether it is an Observer."""
        from lorakit.api.observer import Observer

        return isinstance(made, Observer)

    def build(self, run_info: RunInfo) -> Observer:
        """The observer of one run; called on the main process only."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")
