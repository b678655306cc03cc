"""The sections of a config file that are not components, and the complete config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from attrs import evolve, field, fields, frozen
from attrs import validators as v

from lorakit.api.components import (
    AttentionConfig,
    Component,
    LRSchedulerConfig,
    NetworkConfig,
    ObserverConfig,
    OptimizerConfig,
    SaverConfig,
)
from lorakit.api.loss import LossConfig
from lorakit.api.model_family import ModelFamilyConfig
from lorakit.api.sampling import TimestepSamplerConfig
from lorakit.config.datasets import DataSection
from lorakit.config.metadata import MetadataSection
from lorakit.errors import Problem
from lorakit.plugins.failures import collect_problems

DEFAULT_MAX_STEPS = 1600
QUANTIZATION_KEYS = ("fp8_base", "int8_base", "nf4_base")
"""Keys of `[training]` that name parts of the base model to quantize, each called after its format."""
AUTOTUNE_KEYS = ("cuda_graphs", "channels_last", "compile")
"""Keys of `[training]` that may or may not make a step faster; `auto` measures it."""

UNIFIED_MEMORY_DEVICES = ("cpu", "mps")
"""Devices that compute in CPU RAM."""


def _plain_file_name(_: object, __: object, value: str) -> None:
    if value.strip(". ") and value[-1] in ". ":
        raise ValueError(
            f"must not end with a space or a dot, which Windows removes: {value.rstrip('. ')!r}, not {value!r}"
        )
    if not value.strip(". ") or len(value) > 200 or not value.isprintable() or set(value) & set("/\\"):
        raise ValueError(f"must be a plain file name, without folders, not {value!r}")
    impossible = sorted(set(value) & set('<>:"|?*'))
    if impossible:
        raise ValueError(
            f"must not contain {' '.join(impossible)}, which Windows does not allow in file names, not {value!r}"
        )
    if re.fullmatch(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d\xb9\xb2\xb3])(\..*)?", value, re.IGNORECASE):
        raise ValueError(f"must not be {value!r}, which is a reserved name on Windows; choose another name")
    stem, dot, suffix = value.rpartition(".")
    if dot and suffix.lower() in ("safetensors", "ckpt", "pt"):
        raise ValueError(f"must not include the file extension, which is added automatically: {stem!r}, not {value!r}")


def _share(_: object, __: object, value: float) -> None:
    if not isinstance(value, bool) and not 0 < value < 1:
        raise ValueError(f"must be true, false or a fraction between 0 and 1, not {value:g}")


def _device(_: object, __: object, value: str) -> None:
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:(0|[1-9]\d?))?", value):
        raise ValueError(f'must be "auto", "cpu", "cuda", "mps" or "xpu", or a number such as "cuda:1", not {value!r}')


@frozen(kw_only=True)
class TrainingSection:
    """Duration, precision, memory and speed."""

    max_epochs: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Number of epochs; overrides `max_steps`."""
    max_steps: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Number of optimizer steps; 1600 if neither this nor `max_epochs` is set."""
    gradient_accumulation_steps: int = field(default=1, validator=v.ge(1))
    """Micro-batches per optimizer step; their gradients are averaged."""
    gradient_checkpointing: bool | float = field(default=False, validator=_share)
    """Recompute activations in the backward pass: saves memory, about a third slower. With a fraction such as 0.5, only
    in that fraction of the denoiser's blocks, those with the largest activations."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Dtype of the base model and of activations; the LoRA weights stay float32. `auto` is `bf16` on GPUs with units
    for it (NVIDIA's from the RTX 30 series on), `fp16` on older ones, and `no`, float32, on CPUs, `mps` and `xpu`."""
    fp8_base: tuple[str, ...] = ()
    """Parts of the base model to quantize to fp8 (8-bit floats), named as in `network.parts`. Takes half the memory of
    bf16 and makes steps a little slower; the LoRA weights, activations and compute dtype are unaffected."""
    int8_base: tuple[str, ...] = ()
    """Parts to quantize to int8 (per-channel scales): as small as fp8, usually more accurate."""
    nf4_base: tuple[str, ...] = ()
    """Parts to quantize to 4-bit NF4: little more than half the size of 8 bits, but less accurate."""
    stream_base: tuple[str, ...] = ()
    """Parts to keep in CPU RAM and swap to the GPU block by block ("block swap"). They take the GPU memory of two
    blocks; a step is slower where copying a block takes longer than computing it."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Capture a micro-batch of each image size as a CUDA graph and replay it. With `auto`, here and for the next two
    keys, a short measurement at the start of the run decides; graphs are off where there is no CUDA."""
    channels_last: bool | Literal["auto"] = False
    """Use channels-last (NHWC) memory format in the denoiser; faster on some GPUs."""
    compile: bool | Literal["auto"] = False
    """Compile the denoiser with torch.compile. The first step, and the first of each image size, takes longer."""
    compile_backend: str = "inductor"
    """Backend of torch.compile; `inductor` needs a C++ compiler on CPUs and Triton on GPUs."""
    tf32: bool = False
    """Allow TF32 on CUDA: float32 matmuls and convolutions several times faster, with 10-bit mantissas."""
    deterministic: bool = False
    """Use deterministic operations only: runs on GPUs are then repeatable, and resumable, bit for bit, but slower. On
    CPUs they always are."""
    seed: int = field(default=42, validator=v.ge(0))
    """Random seed; the same seed gives the same run."""
    max_grad_norm: float = field(default=1.0, validator=v.ge(0))
    """Clip the gradient norm to this value; 0 disables clipping."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when the loss or a gradient is NaN or infinite: `stop` the run, or `skip` the step without an update;
    after 20 skipped steps in a row the run stops."""
    device: str = field(default="auto", validator=_device)
    """Device to train on: `cpu`, `cuda`, `mps`, `xpu`, or one of several GPUs, such as `cuda:0`; `auto` uses an
    accelerator if there is one."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which several processes sum their gradients; `bf16` sends half as much, rounded to 8 bits, which pays
    where GPUs are connected slowly and the network is large."""
    process_timeout: float | None = field(default=None, validator=v.optional(v.gt(0)))
    """Minutes that processes wait for each other before the run fails; by default 10 on accelerators and 30 on CPUs."""

    @property
    def quantization(self) -> dict[str, str]:
        """The quantization of each quantized part of the base model: `{"unet": "nf4"}`."""
        return {part: key.removesuffix("_base") for key in QUANTIZATION_KEYS for part in getattr(self, key)}

    @property
    def excludes_graphs(self) -> str:
        """Why `cuda_graphs = "auto"` leaves graphs off whatever the device; empty if it does not."""
        if self.deterministic:
            return "training.deterministic excludes what depends on timing"
        if self.stream_base:
            return "training.stream_base copies weights in each step"
        if self.compile and self.compile_backend == "cudagraphs":
            return "training.compile_backend captures them"
        return ""

    def problems(self) -> Iterator[Problem]:
        """Keys that conflict; keys are field names."""
        keys: dict[str, str] = {}
        for key in QUANTIZATION_KEYS:
            for part in dict.fromkeys(getattr(self, key)):
                if part in keys:
                    yield Problem(
                        key, f"contains {part!r}, as does training.{keys[part]}", "remove it from one of them"
                    )
                keys.setdefault(part, key)
        if self.cuda_graphs is True and self.compile and self.compile_backend == "cudagraphs":
            yield Problem("compile_backend", '"cudagraphs" duplicates training.cuda_graphs', "use only one of them")
        for key in ("channels_last", "compile"):
            if self.deterministic and getattr(self, key) == "auto":
                yield Problem(
                    key, "depends on timing, which conflicts with training.deterministic", "set true or false"
                )
        for key, is_on in {"compile": bool(self.compile), "cuda_graphs": self.cuda_graphs is True}.items():
            if self.stream_base and is_on:
                yield Problem("stream_base", f"cannot be used with training.{key}", "remove one of them")

    def warnings(self) -> Iterator[Problem]:
        """Keys without effect; keys are field names."""
        if self.max_epochs and self.max_steps:
            yield Problem("max_steps", "has no effect, because training.max_epochs is given")
        if self.compile_backend != "inductor" and not self.compile:
            yield Problem("compile_backend", "has no effect without training.compile")
        if self.tf32 and self.mixed_precision in ("fp16", "bf16"):
            hint = "it affects only float32 operations, such as DoRA's norms"
            yield Problem("tf32", f"has almost no effect with mixed_precision {self.mixed_precision!r}", hint)
        yield from self.ineffective_offload(self.device)

    def ineffective_offload(self, device: str) -> Iterator[Problem]:
        """A warning if weights are offloaded for a kind of device that computes in CPU RAM."""
        if self.stream_base and device in UNIFIED_MEMORY_DEVICES:
            yield Problem("stream_base", f"saves nothing, because {device} computes in CPU RAM")


@frozen(kw_only=True)
class OutputSection:
    """Output folder, file names and saves."""

    dir: Path
    """Folder for the results; created if missing."""
    name: str = field(default="lora", validator=_plain_file_name)
    """File name of the LoRA, without extension."""
    save_every_n_epochs: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Save every N epochs."""
    save_n_epoch_ratio: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Save about N times, evenly spaced over the epochs; overrides `save_every_n_epochs`."""
    save_every_n_steps: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Save every N optimizer steps."""
    keep_last: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Number of intermediate saves to keep; all if absent."""
    save_state: bool = False
    """With each save, also save the training state, from which `--resume` continues."""
    save_state_at_end: bool = False
    """Save the training state at the end of the run, even without `save_state`."""
    keep_last_states: int = field(default=1, validator=v.ge(1))
    """Number of training states to keep; each is about three times the size of the LoRA."""
    training_comment: str | None = None
    """A comment to store in the file's metadata."""

    def epochs_between_saves(self, total_epochs: int) -> int | None:
        """Epochs between two saves; None if the run does not save by epochs."""
        ratio = self.save_n_epoch_ratio
        return max(1, total_epochs // ratio) if ratio else self.save_every_n_epochs

    def warnings(self) -> Iterator[Problem]:
        """Keys without effect; keys are field names."""
        if self.keep_last and not (self.save_every_n_epochs or self.save_n_epoch_ratio or self.save_every_n_steps):
            yield Problem("keep_last", "has no effect without save_every_n_epochs or save_every_n_steps")
        if self.save_n_epoch_ratio and self.save_every_n_epochs:
            yield Problem("save_every_n_epochs", "has no effect, because output.save_n_epoch_ratio is given")
        if self.save_state and self.save_state_at_end:
            yield Problem("save_state_at_end", "has no effect, because output.save_state is set")
        if self.keep_last_states > 1 and not self.save_state:
            yield Problem("keep_last_states", "has no effect without save_state")


@frozen(kw_only=True)
class TrainConfig:
    """The complete config of a training run."""

    model: ModelFamilyConfig
    """The base model."""
    data: DataSection
    """The images and captions."""
    network: NetworkConfig
    """The adapters."""
    optimizer: OptimizerConfig
    """The optimizer."""
    lr_scheduler: LRSchedulerConfig
    """The learning-rate schedule."""
    attention: AttentionConfig
    """The attention backend."""
    training: TrainingSection
    """Duration, precision, memory and speed."""
    loss: LossConfig
    """The loss."""
    timesteps: TimestepSamplerConfig
    """The distribution of timesteps, as `[timesteps]` has it."""
    output: OutputSection
    """Output folder, file names and saves."""
    metadata: MetadataSection
    """Metadata of saved files."""
    saver: SaverConfig
    """The file format."""
    observers: tuple[ObserverConfig, ...] = ()
    """Logs, previews and other callbacks."""

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """The parts of the model with adapters and a learning rate above zero."""
        parts = self.model.parts_named(self.network.parts)
        return tuple(part.name for part in parts if any(self.optimizer.lrs_for(part)))

    @property
    def trains_text_encoders(self) -> bool:
        """Whether any text encoder gets adapters, so that captions are encoded in each step."""
        return any(part.encoders for part in self.model.parts if part.name in self.trained_parts)

    @property
    def cache_dir(self) -> Path:
        """The folder for cached latents and text embeddings."""
        return self.data.cache_dir or self.output.dir / "cache"

    @property
    def timestep_sampler(self) -> TimestepSamplerConfig:
        """The distribution of timesteps, with the bounds that `[loss]` may have."""
        low, high = self.loss.min_timestep, self.loss.max_timestep
        given = {key: value for key, value in {"min": low, "max": high}.items() if value is not None}
        return evolve(self.timesteps, **given)

    def problems(self) -> Iterator[Problem]:
        """Problems that involve several sections."""
        parts_of = {f"training.{key}": getattr(self.training, key) for key in (*QUANTIZATION_KEYS, "stream_base")}
        known = [part.name for part in self.model.parts]
        for key, parts in {"network.parts": self.network.parts or (), **parts_of}.items():
            unknown = [part for part in parts if part not in known]
            if unknown:
                hint = f"{self.model.name} has {', '.join(known)}"
                yield Problem(key, f"contains unknown parts: {', '.join(unknown)}", hint)
        if not self.trained_parts and set(self.network.parts or known) & set(known):
            yield Problem("optimizer.lr", "is zero for every part in network.parts, so nothing would be trained")
        rates, encoders = self.optimizer.text_encoder_lr, self.model.text_encoders
        if isinstance(rates, tuple) and len(rates) != encoders:
            message = f"must have one number per text encoder of {self.model.name}, which has {encoders}"
            yield Problem("optimizer.text_encoder_lr", f"{message}, not {len(rates)}")
        if self.data.weighted_captions and not self.model.supports_weighted_captions:
            yield Problem("data.weighted_captions", f"cannot be used with {self.model.name}", "leave it out")
        if self.network.ema is not None and self.optimizer.schedule_free:
            message = f"cannot be used with {self.optimizer.name}, which averages the weights itself"
            yield Problem("network.ema", message, "leave it out, or choose another optimizer")
        yield from self._size_problems()
        if self.training.mixed_precision == "fp16" and self.model.overflows_fp16:
            message = f"cannot be used: {self.model.title or self.model.name} overflows in fp16"
            yield Problem("training.mixed_precision", message, 'set "bf16", or "no" for float32')
        for section, component in self._components():
            yield from with_section(collect_problems(component, "problems_with", self), section)

    def _size_problems(self) -> Iterator[Problem]:
        """Sizes of images that the model's latents cannot have."""
        multiple = self.model.size_multiple
        for index, dataset in enumerate(self.data.datasets):
            place = f"data.datasets[{index}]" if len(self.data.datasets) > 1 else "data"
            if dataset.enable_bucket and dataset.bucket_reso_steps % multiple:
                yield Problem(f"{place}.bucket_reso_steps", f"must be a multiple of {multiple} for this model")
            if not dataset.enable_bucket and any(side % multiple for side in dataset.resolution):
                yield Problem(f"{place}.resolution", f"must have sides that are multiples of {multiple} for this model")

    def warnings(self) -> Iterator[Problem]:
        """Options that have no effect in this run or are unusual for the model."""
        for section, component in self._components():
            yield from with_section(collect_problems(component, "warnings"), section)
            yield from with_section(collect_problems(component, "warnings_with", self), section)
        yield from self._rate_warnings()
        yield from with_section(self.training.warnings(), "training")
        yield from with_section(self.output.warnings(), "output")
        yield from _data_warnings(self.data)

    def _rate_warnings(self) -> Iterator[Problem]:
        """Learning rates of parts without adapters, and schedules unsuitable for the optimizer."""
        adapted = self.model.parts_named(self.network.parts)
        for part in adapted:
            # A rate of 0 for a part that is not named says that it is to be left alone.
            if self.network.parts and not any(self.optimizer.lrs_for(part)):
                yield Problem("network.parts", f"{part.name!r} is not trained, because its learning rate is 0")
        for key in dict.fromkeys(part.lr_key for part in self.model.parts):
            names = [part.name for part in self.model.parts if part.lr_key == key]
            if getattr(self.optimizer, key) is not None and not any(part.lr_key == key for part in adapted):
                message = f"has no effect, because {' or '.join(map(repr, names))} is not in network.parts"
                yield Problem(f"optimizer.{key}", message)
        yield from self._doubtful_rates()
        if self.training.max_epochs is None:
            yield from self.warnings_of_length(self.training.max_steps or DEFAULT_MAX_STEPS)
        if self.optimizer.schedule_free and not self.lr_scheduler.is_constant:
            hint = "for a warm-up, set optimizer.warmup_steps" if hasattr(self.optimizer, "warmup_steps") else ""
            yield Problem("lr_scheduler.name", f"is unusual with {self.optimizer.name}, which needs no schedule", hint)

    def _doubtful_rates(self) -> Iterator[Problem]:
        """Learning rates far too low or too high for the optimizer."""
        own, parts = self.optimizer, self.model.parts_named(self.network.parts)
        rates = [rate for part in parts for rate in self.optimizer.lrs_for(part)]
        highest, usual = max(rates, default=0.0), own.usual_lr
        if own.finds_learning_rate and highest <= 0.1:
            message = f"{own.name} finds the learning rate itself and multiplies it by lr; with {highest:g} it hardly"
            yield Problem("optimizer.lr", f"{message} trains", "set 1")
        elif not own.finds_learning_rate and usual is not None and highest > 100 * usual:
            message = f"{highest:g} is far too high for {own.name} and usually ruins the LoRA"
            yield Problem("optimizer.lr", message, f"{usual:g} is usual")

    def warnings_of_length(self, total_steps: int) -> Iterator[Problem]:
        """What hardly suits a run of `total_steps` optimizer steps."""
        for section, component in self._components():
            yield from with_section(collect_problems(component, "warnings_of_length", total_steps), section)

    def _components(self) -> Iterator[tuple[str, Component]]:
        """Every component with its section."""
        sections = {own.name: getattr(self, own.name) for own in fields(TrainConfig)}
        sections |= {f"observers[{index}]": observer for index, observer in enumerate(self.observers)}
        return ((section, value) for section, value in sections.items() if isinstance(value, Component))


def with_section(problems: Iterable[Problem], section: str) -> Iterator[Problem]:
    """The problems with their full keys."""
    return (evolve(problem, key=f"{section}.{problem.key}") for problem in problems)


def _data_warnings(data: DataSection) -> Iterator[Problem]:
    if any(dataset.bucket_no_upscale and not dataset.enable_bucket for dataset in data.datasets):
        yield Problem("data.bucket_no_upscale", "has no effect without enable_bucket")
    if any(dataset.validation_seed is not None and not dataset.validation_split for dataset in data.datasets):
        yield Problem("data.validation_seed", "has no effect without validation_split")
    subsets = [subset for dataset in data.datasets for subset in dataset.subsets]
    off = [subset.place for subset in subsets if not subset.num_repeats]
    if off:
        yield Problem("data.num_repeats", f"is 0, which disables {', '.join(off)}")
    without = "without shuffle_caption, caption_tag_dropout_rate or token_warmup_step"
    if any(subset.keep_tokens and not subset.changes_tags for subset in subsets):
        yield Problem("data.keep_tokens", f"has no effect {without}")
    if any(subset.keep_tokens_separator and not subset.changes_tags for subset in subsets):
        yield Problem("data.keep_tokens_separator", f"is removed from captions and has no other effect {without}")
    if any(subset.token_warmup_min != 1 and not subset.token_warmup_step for subset in subsets):
        yield Problem("data.token_warmup_min", "has no effect without token_warmup_step")
    if any(subset.alpha_mask and subset.conditioning_data_dir for subset in subsets):
        yield Problem("data.alpha_mask", "has no effect in subsets with conditioning_data_dir, whose masks are used")
    if data.prior_loss_weight != 1 and not any(subset.is_reg for subset in subsets):
        yield Problem("data.prior_loss_weight", "has no effect without a subset with is_reg")
