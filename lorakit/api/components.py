"""The base classes of everything that a user picks by name.

A component is a frozen attrs class. Its fields are the keys of its section of the config file, the string under a field
is its help text, validators check values, and `build` makes the object itself. Importing a component imports nothing
heavy: torch and optional packages are imported inside `build`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from attrs import field, fields, frozen
from attrs import validators as v

from lorakit.errors import Problem

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from lorakit.api.observer import Observer, RunInfo
    from lorakit.config.train_config import TrainConfig
    from lorakit.models.interfaces import AdaptationTarget, AttentionBackend
    from lorakit.networks.adapter_file import Saver
    from lorakit.networks.network import Network, ParameterGroup

ComponentT = TypeVar("ComponentT", bound="Component")


@frozen(kw_only=True)
class Component:
    """A component that a user picks by name in a config file."""

    kind: ClassVar[str]
    """What it is, for messages: `optimizer`, `network`, …"""
    name: ClassVar[str]
    """Its name in the config file."""
    name_key: ClassVar[str] = "name"
    """The key that the name is written under."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Optional packages that `build` imports, by their names on PyPI; a config that needs a missing one is refused."""
    product: ClassVar[str] = "something"
    """What `build` must return, for messages: `a torch.optim.Optimizer`."""
    product_methods: ClassVar[tuple[str, ...]] = ()
    """Names of methods that the class of what `build` returns must have; `__call__` for a function."""
    takes_import_path: ClassVar[bool] = False
    """Whether it stands for classes of any package, whose import path the user writes instead of a name."""

    def problems(self) -> Iterator[Problem]:
        """Problems of the fields taken together; keys are field names.

        Called when a config is read, after the fields' types and validators. Yields nothing if the fields can be used.
        """
        return iter(())

    def warnings(self) -> Iterator[Problem]:
        """Fields that have no effect, or may be a mistake; keys are field names.

        Called by `lorakit check` and before training, for a config without problems.
        """
        return iter(())

    def problems_with(self, config: TrainConfig) -> Iterator[Problem]:  # noqa: ARG002
        """Problems of the fields in a run of this config; keys are field names.

        Called when a config is read, once all of its sections are right.
        """
        return iter(())

    def warnings_with(self, config: TrainConfig) -> Iterator[Problem]:  # noqa: ARG002
        """Fields that have no effect, or may be a mistake, in a run of this config; keys are field names.

        Called together with `warnings`.
        """
        return iter(())

    @classmethod
    def is_product(cls, made: object) -> bool:
        """Whether an object that `build` returned can be used; if not, the run ends with a PluginError."""
        # Of the class, because asking a model itself for a part would load that part.
        methods = {name for base in type(made).__mro__ for name, method in vars(base).items() if callable(method)}
        return methods >= {*cls.product_methods}

    def warnings_of_length(self, total_steps: int) -> Iterator[Problem]:  # noqa: ARG002
        """Fields that may be a mistake in a run of `total_steps` optimizer steps; keys are field names.

        Called together with `warnings`, once the images are counted.
        """
        return iter(())


@frozen
class ModelPart:
    """A part of a family's base models that adapters can be for: the denoiser, or one or more text encoders."""

    name: str
    """What configs call it: `unet`."""
    title: str = field(kw_only=True)
    """What messages call it: `U-Net`."""
    encoders: tuple[int, ...] = field(default=(), kw_only=True)
    """The numbers of the text encoders in it, counted from 0 over all parts; none for the denoiser."""
    lora_prefix: str = field(default="", kw_only=True)
    """What its layers' keys in LoRA files begin with: `lora_unet_`; when empty, files to start from are not checked for
    adapters of this part."""
    lora_layers: tuple[str, ...] = field(default=(), kw_only=True)
    """The ends of the keys of those layers of its transformers that every LoRA file for it adapts: `attn1_to_q`."""

    @property
    def lr_key(self) -> str:
        """The key of `[optimizer]` with the learning rate of its adapters."""
        return TEXT_ENCODER_LR if self.encoders else DENOISER_LR


DENOISER_LR, TEXT_ENCODER_LR = "unet_lr", "text_encoder_lr"
"""The keys of `[optimizer]` with the learning rates of the denoiser, whatever it is, and of the text encoders."""


def with_import_path(component: type[ComponentT], path: str) -> type[ComponentT]:
    """A component with an import path as its name if it has `takes_import_path`; any other as it is."""
    found: type[ComponentT] = _at(component, path) if component.takes_import_path else component  # type: ignore[arg-type]
    return found


@cache
def _at(component: Any, path: str) -> Any:
    own = {"name": path, "__doc__": f"`{path}`, a class of another package.", "__module__": component.__module__}
    return frozen(kw_only=True)(type(component.__name__, (component,), own))


@frozen(kw_only=True)
class NetworkConfig(Component):
    """The network: a kind of adapter and the layers it is added to."""

    kind = "network"
    product = "a Network"
    product_methods = ("initialize", "parameter_groups", "load_adapter_state", "begin_batch")

    parts: tuple[str, ...] | None = field(default=None, validator=v.optional(v.min_len(1)))
    """Parts of the base model that get adapters: for Stable Diffusion `unet` and `text_encoder`, for SDXL also
    `text_encoder_2`. All of them when absent."""
    weights: Path | None = None
    """A file to start from, saved by lorakit, sd-scripts, LyCORIS, diffusers or PEFT; of the kind that is trained."""

    ema: float | None = field(default=None, validator=v.optional(v.and_(v.gt(0), v.lt(1))))
    """Decay of an exponential moving average of the adapters over the steps: files, previews and validation then hold
    the average instead of the last weights, which vary more. 0.99 to 0.999 are usual; no average when absent."""

    def adapts(self, target: AdaptationTarget) -> bool:
        """Whether a layer may get an adapter: whether it belongs to one of `parts`, or these are absent."""
        return self.parts is None or target.part in self.parts

    def metadata(self) -> Mapping[str, object]:
        """Metadata of LoRA files about the network, such as `ss_network_module` and `ss_network_dim`."""
        return {"ss_network_module": self.name}

    def build(self, targets: Sequence[AdaptationTarget]) -> Network:
        """The adapters for those of the targets that this network adapts, attached to them.

        Called once in a run, before the optimizer's `build`. `targets` are layers of the trained parts.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method build")


def _rates(_: object, __: object, value: float | tuple[float, ...] | None) -> None:
    rates = value if isinstance(value, tuple) else (value,)
    if not rates:
        raise ValueError("must not be empty")
    if any(rate is not None and rate < 0 for rate in rates):
        raise ValueError(f"must be at least 0, not {min(rate for rate in rates if rate is not None):g}")


@frozen(kw_only=True)
class OptimizerConfig(Component):
    """The optimizer."""

    kind = "optimizer"
    product = "a torch.optim.Optimizer"

    supports_group_lrs: ClassVar[bool] = True
    """Whether parts of the model may have different learning rates; 0, which leaves a part out, is always allowed."""
    schedule_free: ClassVar[bool] = False
    """Whether it averages the weights itself and needs no LR schedule; any but a constant one is then a warning, and
    `network.ema` an error."""
    finds_learning_rate: ClassVar[bool] = False
    """Whether it estimates the learning rate and multiplies it by `lr`, which is then about 1."""
    elementwise: ClassVar[bool] = False
    """Whether it updates each number by itself, whatever parameter the number belongs to. It then gets each group's
    parameters as a single one, which takes one kernel instead of hundreds."""
    usual_lr: ClassVar[float | None] = None
    """The usual learning rate: `lorakit init` writes it, and more than a hundred times as much is a warning."""
    usual_options: ClassVar[Mapping[str, object]] = {}
    """Values of other keys that go with it, which `lorakit init` writes, too."""

    lr: float = field(default=1e-4, validator=v.ge(0))
    """Learning rate of the adapters of all parts without a separate one."""
    unet_lr: float | None = field(default=None, validator=v.optional(v.ge(0)))
    """Learning rate of the denoiser's adapters, that is the U-Net's or the transformer's; `lr` when absent."""
    text_encoder_lr: tuple[float, ...] | float | None = field(default=None, validator=_rates)
    """Learning rate of the text encoder's adapters; `lr` when absent. With 0 it gets none. For a model with several
    text encoders, a list with one number for each."""

    @property
    def supports_lr_multipliers(self) -> bool:
        """Whether a network may multiply the learning rate of some of its parameters."""
        return self.supports_group_lrs

    def lrs_from(self, key: str) -> tuple[float, ...]:
        """The learning rates that `unet_lr` or `text_encoder_lr` gives: one, or one for each text encoder."""
        given: float | tuple[float, ...] | None = getattr(self, key)
        if isinstance(given, tuple):
            return given
        return (self.lr if given is None else given,)

    def lrs_for(self, part: ModelPart) -> tuple[float, ...]:
        """The learning rates of a part of the model: one, or one for each of its text encoders."""
        rates = self.lrs_from(part.lr_key)
        return tuple(rates[number] for number in part.encoders if number < len(rates)) if len(rates) > 1 else rates

    def lr_for(self, encoder: int | None = None) -> float:
        """The learning rate of the denoiser's adapters, or of those of a text encoder by its number, from 0."""
        rates = self.lrs_from(DENOISER_LR if encoder is None else TEXT_ENCODER_LR)
        return rates[encoder] if encoder and len(rates) > 1 else rates[0]

    def extra_options(self) -> dict[str, Any]:
        """The values of the fields that this class adds to those of `OptimizerConfig`, by name."""
        shared = {own.name for own in fields(OptimizerConfig)}
        return {own.name: getattr(self, own.name) for own in fields(type(self)) if own.name not in shared}

    def problems(self) -> Iterator[Problem]:
        """Learning rates that differ between parts although only one is supported."""
        rates = {key: set(self.lrs_from(key)) - {0} for key in (DENOISER_LR, TEXT_ENCODER_LR)}
        if self.supports_group_lrs or len(set().union(*rates.values())) < 2:
            return
        for key, own in rates.items():
            for rate in own - {self.lr}:
                hint = f"leave it out, or set {key} = 0 to leave this part out"
                yield Problem(key, f"must be lr, {self.lr:g}, with {self.name}, not {rate:g}", hint)

    def check_lrs(self, rates: Sequence[float]) -> Iterator[Problem]:
        """Problems of the learning rates that a network asks for; keys are those of the config file.

        Called once the network is built.
        """
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
        """The optimizer over the groups, each with its learning rate and name.

        Called once the network is attached; and before images are encoded, for a dry run with one parameter a group.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method build")


@frozen(kw_only=True)
class LRSchedulerConfig(Component):
    """The learning-rate schedule: the factor of the optimizer's learning rate in each step."""

    kind = "LR scheduler"
    product = "an LRScheduler of torch.optim.lr_scheduler"

    is_constant: ClassVar[bool] = False
    """Whether the learning rate is constant."""

    @classmethod
    def is_product(cls, made: object) -> bool:
        """Whether it is an LRScheduler of torch.optim.lr_scheduler."""
        from torch.optim.lr_scheduler import LRScheduler

        return isinstance(made, LRScheduler)

    def build(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The schedule over `total_steps` optimizer steps, whatever the number of processes.

        Called after the optimizer's `build`; and before images are encoded, for a dry run.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method build")


@frozen(kw_only=True)
class AttentionConfig(Component):
    """The implementation of attention in the denoiser, softmax(q·kᵀ/√d)·v."""

    kind = "attention backend"
    product = "a function"
    product_methods = ("__call__",)

    def build(self) -> AttentionBackend:
        """The function that computes attention: of queries, keys and values [B, heads, tokens, d] and a mask or None.

        The mask is bool, [B, 1, 1, tokens of the key], and false for keys that get no weight, such as the padding of
        captions of different lengths. All are passed by position; the result is as large as the queries. Called once
        in a run, before the network is built.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method build")


@frozen(kw_only=True)
class SaverConfig(Component):
    """The file format of LoRA files."""

    kind = "saver"
    product = "a Saver, with save, load and a suffix such as '.safetensors'"
    product_methods = ("save", "load")

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Data type of the weights in the file."""

    @classmethod
    def is_product(cls, made: object) -> bool:
        """Whether it is a Saver, with save, load and a suffix such as '.safetensors'."""
        suffix = getattr(made, "suffix", None)
        return isinstance(suffix, str) and suffix.startswith(".") and super().is_product(made)

    def build(self) -> Saver:
        """The object that writes and reads this format.

        Called once in a run, before its first step.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method build")


@frozen(kw_only=True)
class ObserverConfig(Component):
    """A callback: logging, progress bar, previews."""

    kind = "observer"
    product = "an Observer"

    essential: ClassVar[bool] = False
    """Whether the run ends when this observer fails; others are disabled with a warning."""
    everywhere: ClassVar[bool] = False
    """Whether all processes run this observer, instead of the main one alone. On each of them it must then call the
    same methods of the run that need all: `together` and `shared_validation_loss`."""

    @classmethod
    def is_product(cls, made: object) -> bool:
        """Whether it is an Observer."""
        from lorakit.api.observer import Observer

        return isinstance(made, Observer)

    def build(self, run_info: RunInfo) -> Observer:
        """The observer of one run.

        Called once before the first step, on the main process only unless it runs `everywhere`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method build")
