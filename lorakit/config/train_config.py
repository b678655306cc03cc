"""The sections of a config file that are not components, and the whole of it."""

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
    ModelFamilyConfig,
    NetworkConfig,
    ObserverConfig,
    OptimizerConfig,
    SaverConfig,
)
from lorakit.api.loss import LossConfig
from lorakit.api.sampling import TimestepSamplerConfig
from lorakit.config.datasets import DataSection
from lorakit.config.metadata import MetadataSection
from lorakit.errors import Problem
from lorakit.plugins.failures import collect_problems

DEFAULT_MAX_STEPS = 1600
QUANTIZATION_KEYS = ("fp8_base", "int8_base", "nf4_base")
"""Keys of `[training]` that name parts of the base model to keep in fewer bits, each after the form for that."""
AUTOTUNE_KEYS = ("cuda_graphs", "channels_last", "compile")
"""Keys of `[training]` that make the same step faster, or not, and that may be left to a measurement."""

UNIFIED_MEMORY_DEVICES = ("cpu", "mps")
"""Devices that compute in the computer's memory."""


def _plain_file_name(_: object, __: object, value: str) -> None:
    if (
        not value.strip(". ")
        or value[-1] in ". "
        or len(value) > 200
        or not value.isprintable()
        or set(value) & set("/\\")
    ):
        raise ValueError(f"must be a plain file name, without folders, not {value!r}")
    impossible = sorted(set(value) & set('<>:"|?*'))
    if impossible:
        raise ValueError(f"must not hold {' '.join(impossible)}, which Windows has in no file name, not {value!r}")
    if re.fullmatch(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d\xb9\xb2\xb3])(\..*)?", value, re.IGNORECASE):
        raise ValueError(f"must not be {value!r}, which Windows keeps for a device; choose another name")
    stem, dot, suffix = value.rpartition(".")
    if dot and suffix.lower() in ("safetensors", "ckpt", "pt"):
        raise ValueError(f"must be without the file's extension, which is added: {stem!r}, not {value!r}")


def _share(_: object, __: object, value: float) -> None:
    if not isinstance(value, bool) and not 0 < value < 1:
        raise ValueError(f"must be true, false or a share between 0 and 1, not {value:g}")


def _device(_: object, __: object, value: str) -> None:
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:(0|[1-9]\d?))?", value):
        raise ValueError(f'must be "auto", "cpu", "cuda", "mps" or "xpu", or a number such as "cuda:1", not {value!r}')


@frozen(kw_only=True)
class TrainingSection:
    """How long and how exactly to train."""

    max_epochs: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Passes over the dataset; wins over `max_steps`."""
    max_steps: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Optimizer steps; 1600 when neither this nor `max_epochs` is given."""
    gradient_accumulation_steps: int = field(default=1, validator=v.ge(1))
    """Micro-batches whose gradients are averaged for one optimizer step."""
    gradient_checkpointing: bool | float = field(default=False, validator=_share)
    """Recompute activations in the backward pass: less memory, about a third more time. With a share such as 0.5, only
    in that share of the denoiser's blocks, those that keep the most."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Number format of the base model and of activations; the adapters stay float32."""
    fp8_base: tuple[str, ...] = ()
    """Parts of the base model whose weights are kept as 8-bit floating-point numbers: `unet`, `text_encoder`, or both.
    They take half the memory of bf16, and some time; adapters, activations and the number format to compute in stay as
    they are."""
    int8_base: tuple[str, ...] = ()
    """Parts whose weights are kept as 8-bit whole numbers: as small as with `fp8_base`, and mostly more exact."""
    nf4_base: tuple[str, ...] = ()
    """Parts whose weights are kept in 4 bits: little more than half the memory of 8 bits, and less exact."""
    stream_base: tuple[str, ...] = ()
    """Parts whose weights stay in the computer's memory and are copied to the GPU block by block, each ahead of its
    use. On the GPU they take the memory of two blocks; a step takes longer where copying does, than computing."""
    cuda_graphs: bool | Literal["auto"] = False
    """Record a micro-batch of each size of images as a CUDA graph, and replay it from then on. With `auto`, as with the
    two keys that follow, a short measurement at the start of the run decides."""
    channels_last: bool | Literal["auto"] = False
    """Keep images in the denoiser with the channels of a pixel next to each other, which some GPUs prefer."""
    compile: bool | Literal["auto"] = False
    """Let torch.compile make the denoiser faster. The first steps take longer, and so does the first of each size of
    images."""
    compile_backend: str = "inductor"
    """What torch.compile compiles with; `inductor` needs a C++ compiler on CPUs, and Triton on GPUs."""
    tf32: bool = False
    """Let float32 products on CUDA round their factors to 10 bits, which is several times faster."""
    deterministic: bool = False
    """Compute only with operations that give the same bytes each time. On GPUs a run is then repeated, and resumed, bit
    for bit, and a step takes longer; on CPUs that is so anyway."""
    seed: int = field(default=42, validator=v.ge(0))
    """Where all randomness starts: the same seed gives the same run."""
    max_grad_norm: float = field(default=1.0, validator=v.ge(0))
    """Longer gradients are scaled down to this norm; 0 leaves them as they are."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when the loss or a gradient is NaN or infinite: `stop` the run, or `skip` the step, which then changes
    nothing; after 20 such steps in a row the run stops all the same."""
    device: str = field(default="auto", validator=_device)
    """Where to train: `cpu`, `cuda`, `mps` or `xpu`, or one of several GPUs by number, from `cuda:0`; `auto` takes an
    accelerator where there is one."""
    process_timeout: float | None = field(default=None, validator=v.optional(v.gt(0)))
    """Minutes that processes wait for each other before they give up; 10 on accelerators and 30 on CPUs when absent."""

    @property
    def quantization(self) -> dict[str, str]:
        """The form of the weights of each part of the base model that is kept in fewer bits: `{"unet": "nf4"}`."""
        return {part: key.removesuffix("_base") for key in QUANTIZATION_KEYS for part in getattr(self, key)}

    def problems(self) -> Iterator[Problem]:
        """Keys that contradict each other; keys are field names."""
        keys: dict[str, str] = {}
        for key in QUANTIZATION_KEYS:
            for part in dict.fromkeys(getattr(self, key)):
                if part in keys:
                    yield Problem(key, f"names {part!r}, as training.{keys[part]} does", "leave it in one of them")
                keys.setdefault(part, key)
        if self.cuda_graphs and self.compile and self.compile_backend == "cudagraphs":
            yield Problem("compile_backend", 'records what training.cuda_graphs would, with "cudagraphs"', "use one")
        for key in AUTOTUNE_KEYS:
            if self.deterministic and getattr(self, key) == "auto":
                yield Problem(
                    key, "is chosen by the clock, which contradicts training.deterministic", "say true or false"
                )
        for key in ("compile", "cuda_graphs"):
            if self.stream_base and getattr(self, key):
                yield Problem("stream_base", f"cannot be used with training.{key}", "leave out one of them")

    def warnings(self) -> Iterator[Problem]:
        """Keys without effect; keys are field names."""
        if self.max_epochs and self.max_steps:
            yield Problem("max_steps", "has no effect, because training.max_epochs is given")
        if self.compile_backend != "inductor" and not self.compile:
            yield Problem("compile_backend", "has no effect without training.compile")
        if self.tf32 and self.mixed_precision != "no":
            hint = "only what stays float32 is affected, such as DoRA's norms"
            yield Problem("tf32", f"hardly has an effect with mixed_precision {self.mixed_precision!r}", hint)
        yield from self.ineffective_offload(self.device)

    def ineffective_offload(self, device: str) -> Iterator[Problem]:
        """A warning where weights are to be copied to a kind of device that computes where they are."""
        if self.stream_base and device in UNIFIED_MEMORY_DEVICES:
            yield Problem("stream_base", f"saves nothing, because {device} has no memory of its own")


@frozen(kw_only=True)
class OutputSection:
    """Where the results go."""

    dir: Path
    """Folder for the adapters, made when it is missing."""
    name: str = field(default="lora", validator=_plain_file_name)
    """File name of the adapters, without extension."""
    save_every_n_epochs: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Save after every this many epochs."""
    save_n_epoch_ratio: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Save about so many times, evenly over the run's epochs; wins over `save_every_n_epochs`."""
    save_every_n_steps: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Save after every this many optimizer steps."""
    keep_last: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """How many of the saves made along the way to keep; all when absent."""
    save_state: bool = False
    """With each save, save all that is needed to go on from there with `--resume`."""
    save_state_at_end: bool = False
    """Save that at the end of the run, even if `save_state` is not set."""
    keep_last_states: int = field(default=1, validator=v.ge(1))
    """How many states to keep; each is about three times as large as the adapters."""
    training_comment: str | None = None
    """A remark that is kept in the file's metadata."""

    def epochs_between_saves(self, total_epochs: int) -> int | None:
        """After how many epochs each the run saves on its way; None where epochs do not count."""
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
    """A whole training run, as the config file describes it."""

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
    """Length and precision."""
    loss: LossConfig
    """The loss."""
    timesteps: TimestepSamplerConfig
    """The distribution of timesteps, as `[timesteps]` has it."""
    output: OutputSection
    """Where results go."""
    metadata: MetadataSection
    """What the files say of themselves."""
    saver: SaverConfig
    """The file format."""
    observers: tuple[ObserverConfig, ...] = ()
    """Logs, previews and the like."""

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """The parts of the model that get adapters and a learning rate above zero."""
        return tuple(part for part in self.network.parts if any(self.optimizer.lrs_for(part)))

    @property
    def cache_dir(self) -> Path:
        """The folder of encoded images and captions."""
        return self.data.cache_dir or self.output.dir / "cache"

    @property
    def timestep_sampler(self) -> TimestepSamplerConfig:
        """The distribution of timesteps, with the bounds that `[loss]` may have."""
        low, high = self.loss.min_timestep, self.loss.max_timestep
        given = {key: value for key, value in {"min": low, "max": high}.items() if value is not None}
        return evolve(self.timesteps, **given)

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the sections taken together."""
        parts_of = {f"training.{key}": getattr(self.training, key) for key in (*QUANTIZATION_KEYS, "stream_base")}
        for key, parts in {"network.parts": self.network.parts, **parts_of}.items():
            unknown = [part for part in parts if part not in self.model.parts]
            if unknown:
                hint = f"{self.model.name} has {', '.join(self.model.parts)}"
                yield Problem(key, f"names no part of the model: {', '.join(unknown)}", hint)
        if not self.trained_parts:
            yield Problem("optimizer.lr", "is zero for every part in network.parts, so nothing would be trained")
        rates, encoders = self.optimizer.text_encoder_lr, self.model.text_encoders
        if isinstance(rates, tuple) and len(rates) != encoders:
            message = f"must have one number for each text encoder of {self.model.name}, that is {encoders}"
            yield Problem("optimizer.text_encoder_lr", f"{message}, not {len(rates)}")
        if self.data.weighted_captions and not self.model.supports_weighted_captions:
            yield Problem("data.weighted_captions", f"cannot be used with {self.model.name}", "leave it out")
        yield from self._size_problems()
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
        """Options that have no effect in this run, or hardly suit the model."""
        for section, component in self._components():
            yield from with_section(collect_problems(component, "warnings"), section)
            yield from with_section(collect_problems(component, "warnings_with", self), section)
        yield from self._rate_warnings()
        yield from with_section(self.training.warnings(), "training")
        yield from with_section(self.output.warnings(), "output")
        yield from _data_warnings(self.data)

    def _rate_warnings(self) -> Iterator[Problem]:
        """Learning rates of parts without adapters, and schedules that do not suit the optimizer."""
        for part in self.network.parts:
            if not any(self.optimizer.lrs_for(part)):
                yield Problem("network.parts", f"{part!r} gets no adapters, because its learning rate is 0")
        for part in ("unet", "text_encoder"):
            if getattr(self.optimizer, f"{part}_lr", None) is not None and part not in self.network.parts:
                yield Problem(f"optimizer.{part}_lr", f"has no effect, because {part!r} is not in network.parts")
        yield from self._doubtful_rates()
        if self.training.max_epochs is None:
            yield from self.warnings_of_length(self.training.max_steps or DEFAULT_MAX_STEPS)
        if self.optimizer.schedule_free and not self.lr_scheduler.is_constant:
            hint = "A warm-up is optimizer.warmup_steps" if hasattr(self.optimizer, "warmup_steps") else ""
            yield Problem("lr_scheduler.name", f"hardly suits {self.optimizer.name}, which needs no schedule", hint)

    def _doubtful_rates(self) -> Iterator[Problem]:
        """Learning rates that are far too low or too high for the optimizer."""
        own, rates = self.optimizer, [rate for part in self.trained_parts for rate in self.optimizer.lrs_for(part)]
        highest, usual = max(rates, default=0.0), own.usual_lr
        if own.finds_learning_rate and highest <= 0.1:
            message = f"{own.name} finds the learning rate and multiplies it by lr; with {highest:g} hardly anything"
            yield Problem("optimizer.lr", f"{message} is learnt", "set 1")
        elif not own.finds_learning_rate and usual is not None and highest > 100 * usual:
            message = f"{highest:g} is far above what {own.name} learns with, and mostly spoils the LoRA"
            yield Problem("optimizer.lr", message, f"{usual:g} is usual")

    def warnings_of_length(self, total_steps: int) -> Iterator[Problem]:
        """What hardly suits a run of `total_steps` optimizer steps."""
        for section, component in self._components():
            yield from with_section(collect_problems(component, "warnings_of_length", total_steps), section)

    def _components(self) -> Iterator[tuple[str, Component]]:
        """All components, each with its section."""
        sections = {own.name: getattr(self, own.name) for own in fields(TrainConfig)}
        sections |= {f"observers[{index}]": observer for index, observer in enumerate(self.observers)}
        return ((section, value) for section, value in sections.items() if isinstance(value, Component))


def with_section(problems: Iterable[Problem], section: str) -> Iterator[Problem]:
    """The problems with the full paths of their keys."""
    return (evolve(problem, key=f"{section}.{problem.key}") for problem in problems)


def _data_warnings(data: DataSection) -> Iterator[Problem]:
    if any(dataset.bucket_no_upscale and not dataset.enable_bucket for dataset in data.datasets):
        yield Problem("data.bucket_no_upscale", "has no effect without enable_bucket")
    if any(dataset.validation_seed is not None and not dataset.validation_split for dataset in data.datasets):
        yield Problem("data.validation_seed", "has no effect without validation_split")
    subsets = [subset for dataset in data.datasets for subset in dataset.subsets]
    off = [str(subset.metadata_file or subset.image_dir) for subset in subsets if not subset.num_repeats]
    if off:
        yield Problem("data.num_repeats", f"is 0, which leaves out {', '.join(off)}")
    without = "without shuffle_caption, caption_tag_dropout_rate or token_warmup_step"
    if any(subset.keep_tokens and not subset.changes_tags for subset in subsets):
        yield Problem("data.keep_tokens", f"has no effect {without}")
    if any(subset.keep_tokens_separator and not subset.changes_tags for subset in subsets):
        yield Problem("data.keep_tokens_separator", f"is taken out of captions and has no other effect {without}")
    if any(subset.token_warmup_min != 1 and not subset.token_warmup_step for subset in subsets):
        yield Problem("data.token_warmup_min", "has no effect without token_warmup_step")
    if any(subset.alpha_mask and subset.conditioning_data_dir for subset in subsets):
        yield Problem("data.alpha_mask", "has no effect in subsets with conditioning_data_dir, whose masks are used")
    if data.prior_loss_weight != 1 and not any(subset.is_reg for subset in subsets):
        yield Problem("data.prior_loss_weight", "has no effect without a subset with is_reg")
