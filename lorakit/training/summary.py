"""What is said of a run before its first step, as far as it is known without torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorakit._version import __version__
from lorakit.config.train_config import OutputSection, TrainConfig
from lorakit.data.batch_sampler import RunLength, buckets
from lorakit.data.index import Example
from lorakit.training.prepare import PreparedRun
from lorakit.utils.wording import counted, labelled, listed, shown_path

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


def tell(label: str, text: str) -> None:
    """Say one more row of the summary, which is known later than the others."""
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
    if config.prediction == "v_prediction":
        words.append("v-prediction")
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
    own = {key: getattr(network, key, None) for key in ("rank", "alpha", "conv_rank", "conv_alpha")}
    if getattr(network, "rank_from_weights", False):
        sizes = [f"ranks as in {network.weights}"]
    else:
        sizes = [f"{key.replace('_', ' ')} {value:g}" for key, value in own.items() if value is not None]
    kind = ["DoRA"] if getattr(network, "dora", False) else []
    parts = listed([part.title for part in config.model.parts_named(config.trained_parts)])
    return ", ".join([network.name, *kind, *sizes, f"in the {parts}"])


def _saves(output: OutputSection, length: RunLength) -> str:
    return " and ".join([*_saves_on_the_way(output, length), "at the end"])


def _saves_on_the_way(output: OutputSection, length: RunLength) -> Iterator[str]:
    epochs = output.epochs_between_saves(length.total_epochs)
    if epochs is not None and epochs < length.total_epochs:
        yield "after each epoch" if epochs == 1 else f"every {epochs} epochs"
    if output.save_every_n_steps and output.save_every_n_steps < length.total_steps:
        yield f"every {counted(output.save_every_n_steps, 'step')}"
