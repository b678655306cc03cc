"""What a run reports before its first step, as far as it is known without torch, and after its last."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lorakit._version import __version__
from lorakit.api.observer import Observer, RunInfo, StepMetrics
from lorakit.config.train_config import OutputSection, TrainConfig
from lorakit.data.batch_sampler import RunLength, buckets
from lorakit.data.index import Example
from lorakit.networks.ranked_config import RankedConfig
from lorakit.training.prepare import PreparedRun
from lorakit.utils.wording import counted, duration, file_size, labelled, listed, shown_path

log = logging.getLogger(__name__)

LABEL_WIDTH = 8
_SHOWN_BUCKETS = 4
_SUFFIXES = {"safetensors": ".safetensors", "pt": ".pt", "ckpt": ".ckpt"}
"""What file names end with, of the savers that come with lorakit: asking others would import torch."""


def summarize_run(prepared: PreparedRun, source: Path | None = None) -> list[str]:
    """The lines on a run's model, images, steps and network; `source` is its config file."""
    config = prepared.config
    file = config.output.dir / f"{config.output.name}{_SUFFIXES.get(config.saver.name, '')}"
    origin = f"{shown_path(source)} -> " if source else ""
    rows = [
        ("model", _model(config)),
        ("images", _images(prepared)),
        ("steps", f"{length_in_words(prepared.length)}, {_batches(prepared)}"),
        ("network", f"{_network(config)}; saved {_saves(config.output, prepared.length)}"),
    ]
    return [f"lorakit {__version__}: {origin}{shown_path(file)}", *labelled(rows, LABEL_WIDTH)]


def log_row(label: str, text: str) -> None:
    """Log one more row of the summary, which is known later than the others."""
    for line in labelled([(label, text)], LABEL_WIDTH):
        log.info("%s", line)


def length_in_words(length: RunLength) -> str:
    """How long a run is: `10 epochs of 200 steps: 2000 steps`."""
    per_epoch, total = counted(length.steps_per_epoch, "step"), counted(length.total_steps, "step")
    if length.total_steps < length.steps_per_epoch:
        return f"{total}, of an epoch of {length.steps_per_epoch}"
    cut = length.last_epoch_steps
    cut_short = f", the last one cut short after {cut}" if cut < length.steps_per_epoch else ""
    return f"{counted(length.total_epochs, 'epoch')} of {per_epoch}{cut_short}: {total}"


def _model(config: TrainConfig) -> str:
    model = config.model
    path = Path(os.path.normpath(model.path))
    words = [shown_path(path) if path.is_absolute() else model.path, model.title or model.name]
    if getattr(model.noise_process, "prediction", None) == "v_prediction":
        words.append("v-prediction")
    if config.loss.zero_terminal_snr:
        words.append("zero terminal SNR")
    vae = getattr(model, "vae", None)
    return ", ".join(words) + (f", with the VAE {vae}" if vae else "")


def _images(prepared: PreparedRun) -> str:
    examples = [example for dataset in prepared.datasets for example in dataset.examples]
    plain = [example for example in examples if not example.subset.is_reg]
    regularising = [example for example in examples if example.subset.is_reg]
    groups = [_repeated(plain, "")] if plain else []
    groups += [_repeated(regularising, " for regularisation")] if regularising else []
    appearances = sum(example.repeats for example in examples)
    in_all = f": {appearances} an epoch" if appearances != len(examples) or len(groups) > 1 else ""
    held_out = sum(len(dataset.held_out) for dataset in prepared.datasets)
    validated = f"; {held_out} held out for validation" if held_out else ""
    return f"{', and '.join(groups)}{in_all}, in {_buckets(prepared)}{validated}"


def _repeated(examples: Sequence[Example], purpose: str) -> str:
    """A number of images, and how often each appears in an epoch."""
    repeats = [example.repeats for example in examples]
    fewest, most = min(repeats), max(repeats)
    times = (
        "" if most == 1 else f", each {counted(most, 'time')}" if fewest == most else f", each {fewest}-{most} times"
    )
    return f"{len(examples)}{purpose}{times}"


def _buckets(prepared: PreparedRun) -> str:
    sizes = sorted({bucket.size for bucket in buckets(prepared.datasets)})
    texts = [f"{width}x{height}" for width, height in sizes]
    if len(texts) == 1:
        return f"one bucket ({texts[0]})"
    shown = ", ".join(texts) if len(texts) <= _SHOWN_BUCKETS else f"{texts[0]} to {texts[-1]}"
    return f"{len(texts)} buckets ({shown})"


def _batches(prepared: PreparedRun) -> str:
    sizes = sorted({dataset.config.batch_size for dataset in prepared.datasets})
    words = [f"batch size{'s' * (len(sizes) > 1)} {listed([str(size) for size in sizes])}"]
    accumulated = prepared.config.training.gradient_accumulation_steps
    if accumulated > 1:
        words.append(f"{accumulated} batches a step")
    if prepared.processes > 1:
        words.append(f"{prepared.processes} processes")
    return ", ".join(words)


def _network(config: TrainConfig) -> str:
    network = config.network
    found = {key: getattr(network, key, None) for key in ("rank", "alpha", "conv_rank", "conv_alpha")}
    if getattr(network, "rank_from_weights", False):
        sizes = [f"ranks as in {network.weights}"]
    else:
        sizes = [f"{key.replace('_', ' ')} {value:g}" for key, value in found.items() if value is not None]
    kind = ["DoRA"] if getattr(network, "dora", False) else []
    parts = listed([part.title for part in config.model.parts_named(config.trained_parts)])
    return ", ".join([network.name, *kind, *sizes, f"in the {parts}"])


def _saves(output: OutputSection, length: RunLength) -> str:
    epochs, steps, times = output.epochs_between_saves(length.total_epochs), output.save_every_n_steps, []
    if epochs is not None and epochs < length.total_epochs:
        times.append("after each epoch" if epochs == 1 else f"every {epochs} epochs")
    if steps and steps < length.total_steps:
        times.append(f"every {counted(steps, 'step')}")
    return " and ".join([*times, "at the end"])


class RunAccount(Observer):
    """Collects what a run writes and measures; summed up at its end, in lines or as a report for programs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds since any moment."""
        self._clock = clock
        self._started = clock()
        self._run: RunInfo | None = None
        self._saves: dict[Path, int] = {}
        self._recent: deque[float] = deque(maxlen=1)
        self.step = 0
        """The optimizer steps done."""
        self.validations: dict[int, float] = {}
        """Validation losses, by step."""
        self.previews: Sequence[Path] = ()
        """The pictures of the last time of drawing."""

    def run_started(self, run: RunInfo) -> None:
        """Remember the run."""
        self._run = run
        self._recent = deque(maxlen=run.steps_per_epoch)
        self.step = run.first_step

    def step_finished(self, step: int) -> None:
        """Remember the step, to which the saves that follow belong."""
        self.step = step

    def metrics_read(self, metrics: StepMetrics) -> None:
        """Remember the loss."""
        self._recent.append(metrics.loss)

    def adapter_saved(self, path: Path) -> None:
        """Remember the file."""
        self._saves.pop(path, None)
        self._saves[path] = self.step

    def validated(self, step: int, losses: Mapping[str, float]) -> None:
        """Remember the loss."""
        self.validations[step] = losses["average"]

    def previews_drawn(self, step: int, paths: Sequence[Path]) -> None:  # noqa: ARG002
        """Remember the pictures."""
        self.previews = paths or self.previews

    @property
    def seconds(self) -> float:
        """Since the account was opened."""
        return self._clock() - self._started

    @property
    def loss(self) -> float | None:
        """Mean training loss of the last epoch's steps; None before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    @property
    def lowest_step(self) -> int | None:
        """When the validation loss was lowest; None without validation."""
        return min(self.validations, key=self.validations.__getitem__, default=None)

    @property
    def file(self) -> Path | None:
        """The final LoRA file, or the last one saved if the run has not reached its end; None if there is none."""
        saves = self._existing()
        if self._run is None or not saves:
            return None
        return next((path for path in saves if path.stem == self._run.config.output.name), saves[-1])

    def lines(self) -> list[str]:
        """A summary of the run; empty where none was observed that saved something."""
        last, others = self.file, len(self._existing()) - 1
        if self._run is None or last is None:
            return []
        kept = f", and {counted(others, 'other save')}" if others else ""
        first = f"Done in {duration(self.seconds)}: {shown_path(last)} ({file_size(last.stat().st_size)}){kept}"
        return [first, *self._lowest(self._run), *labelled([*self._rows(self._run, last)], LABEL_WIDTH)]

    def _existing(self) -> list[Path]:
        return [path for path in self._saves if path.exists()]

    def _rows(self, run: RunInfo, file: Path) -> Iterator[tuple[str, str]]:
        if self.previews:
            folder = self.previews[0].parent
            sheet = folder / f"{run.config.output.name}_contact_sheet.png"
            draws_sheet = any(getattr(observer, "contact_sheet", False) for observer in run.config.observers)
            yield "previews", shown_path(sheet if draws_sheet and sheet.exists() else folder)
        if isinstance(run.config.network, RankedConfig):
            yield "use", how_to_use(run.config, file)

    def _lowest(self, run: RunInfo) -> Iterator[str]:
        """When the validation loss was lowest, and the file of that moment."""
        step = self.lowest_step
        if step is None:
            return
        files = [path for path in self._existing() if self._saves[path] == step]
        epoch, rest = divmod(step, run.steps_per_epoch)
        when = f"step {step}" if rest or not step else f"epoch {epoch}"
        yield f"Lowest validation loss: {when}" + (f", {shown_path(files[-1])}" if files else "")


def how_to_use(config: TrainConfig, file: Path) -> str:
    """Where a LoRA file goes in the programs that draw with it, and what to write in prompts."""
    in_web_uis = f"models/Lora: <lora:{file.stem}:1> in {', '.join(config.model.web_uis)}; "
    places = f"{in_web_uis if config.model.web_uis else ''}models/loras in ComfyUI"
    subsets = (subset for dataset in config.data.datasets for subset in dataset.subsets)
    words = [config.metadata.trigger_phrase, *(subset.class_tokens for subset in subsets if not subset.is_reg)]
    known = list(dict.fromkeys(word for word in words if word))
    return f"{places}; words: {', '.join(known)}" if known else places
