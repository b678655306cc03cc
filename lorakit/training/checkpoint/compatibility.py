"""May this state be resumed? Only by a run that then gives the result it would have had without a break.

All that differs is named, with both values.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from attrs import evolve, frozen
from torch.optim.lr_scheduler import LRScheduler

from lorakit.config.diff import as_json, differences
from lorakit.config.train_config import AUTOTUNE_KEYS, TrainConfig
from lorakit.data.cache.parallel import map_chunked
from lorakit.data.cache.store import content_key
from lorakit.data.index import Example, default_workers
from lorakit.errors import Problem
from lorakit.training.prepare import PreparedRun
from lorakit.utils.wording import some

log = logging.getLogger(__name__)

NEUTRAL_SECTIONS = ("output", "metadata", "saver", "observers", "attention")
"""Sections that may differ between a state's config and the config of the run that resumes it."""

NEUTRAL_KEYS = {
    "data": ("cache_dir", "workers", "encode_batch_size"),
    "training": (
        "max_epochs", "max_steps", "on_nonfinite", "device", "process_timeout", "gradient_checkpointing", "stream_base",
        "compile_backend", "tf32", "deterministic", *AUTOTUNE_KEYS,
    ),
}  # fmt: skip
"""Keys of other sections that may differ too: what is trained does not depend on them, except for rounding."""

NAMES_SHOWN = 3
"""How many images a message names."""


@frozen
class RunFingerprint:
    """What must be the same when a state is resumed."""

    config: TrainConfig
    """The config, whose batch sizes count the images of all processes."""
    images: Mapping[str, str]
    """The images to train on, in order: a key of all that is trained of each, by its identity."""
    processes: int = 1
    """How many processes there are; what is trained depends on it through the batch sizes alone."""

    @classmethod
    def of(cls, prepared: PreparedRun, processes: int) -> RunFingerprint:
        """That of a run. Raises DataError where an image cannot be read."""
        config, memo = prepared.config, prepared.cache.memo
        datasets = tuple(evolve(dataset, batch_size=dataset.batch_size * processes) for dataset in config.data.datasets)
        examples = [example for dataset in prepared.datasets for example in dataset.examples]

        def key_of(example: Example) -> str:
            """A key of all that is trained of an image, but for what the config says of its subset."""
            mask = memo.digest(example.mask) if example.mask else None
            face, placement = example.face, example.placement
            where = (placement.resized, placement.bucket, placement.crop_xy, face and (face.center, face.side))
            return content_key(memo.digest(example.image), mask, *where, example.repeats, example.caption)[:12]

        with ThreadPoolExecutor(config.data.workers or default_workers()) as pool:
            keys = list(map_chunked(pool, key_of, examples))
        images = {example.sample_id: key for example, key in zip(examples, keys, strict=True)}
        return cls(evolve(config, data=evolve(config.data, datasets=datasets)), images, processes)

    def to_dict(self) -> dict[str, Any]:
        """What a state stores of it, as JSON."""
        tables = {
            section: {key: value for key, value in table.items() if key not in NEUTRAL_KEYS.get(section, ())}
            for section, table in as_json(self.config).items()
            if section not in NEUTRAL_SECTIONS
        }
        return {"processes": self.processes, "config": tables, "images": dict(self.images)}

    def problems_with(self, stored: Mapping[str, Any]) -> list[Problem]:
        """What differs from what `to_dict` gave for another run. Raises whatever a damaged one causes."""
        return list(self._differences(int(stored["processes"]), stored["config"], dict(stored["images"])))

    def _differences(self, processes: int, config: Mapping[str, Any], then: Mapping[str, str]) -> Iterator[Problem]:
        for found in differences(self.config, config):
            section, _, name = found.key.partition(".")
            if section in NEUTRAL_SECTIONS or name in NEUTRAL_KEYS.get(section, ()):
                continue
            values = (json.dumps(value, ensure_ascii=False) for value in (found.before, found.now))
            before, now = ("absent" if text == "null" else text for text in values)
            message = f"{before} in the state, {now} in the config"
            if found.key == "training.mixed_precision":  # "auto" may have chosen both
                yield Problem(found.key, f"{before} in the state, {now} in this run", f"set it to {before}")
                continue
            if not found.key.endswith(".batch_size") or processes == self.processes:
                yield Problem(found.key, message)
                continue
            wanted, left = divmod(found.before, self.processes)
            counted = f"{message}, counting the images of all processes: {processes} then, {self.processes} now"
            yield Problem(found.key, counted, "" if left else f"set it to {wanted} for this number of processes")
        yield from self._image_differences(then)

    def _image_differences(self, then: Mapping[str, str]) -> Iterator[Problem]:
        now = self.images
        added = [name for name in now if name not in then]
        gone = [name for name in then if name not in now]
        changed = [name for name, key in now.items() if then.get(name, key) != key]
        if added or gone:
            lists = [f"{verb} {_some(names)}" for verb, names in (("new:", added), ("gone:", gone)) if names]
            yield Problem("data", f"{len(then)} images in the state, {len(now)} now; {'; '.join(lists)}")
        if changed:
            what = "other content, size, caption, mask or repeats than in the state"
            yield Problem("data", f"{what}: {_some(changed)}")
        if not (added or gone) and list(then) != list(now):
            yield Problem("data", "the images are in another order than in the state")


def fast_forward(lr_scheduler: LRScheduler, first_rates: Sequence[float], steps: int) -> None:
    """Bring a schedule that has not begun to where it is after this many steps.

    `first_rates` are the learning rates of its optimizer's groups before the first step.
    """
    for group, rate in zip(lr_scheduler.optimizer.param_groups, first_rates, strict=True):
        group["lr"] = rate
    with warnings.catch_warnings():
        # It expects an optimizer step before each scheduler step.
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(steps):
            lr_scheduler.step()


def warn_of_length(config: TrainConfig, done: int, before: int, now: int) -> None:
    """Warn if the `done` first steps of a run of `before` steps are not those of a run of `now` steps."""
    if before == now:
        return
    changed = ["learning rates"] if _rates(config, done, before) != _rates(config, done, now) else []
    subsets = [subset for dataset in config.data.datasets for subset in dataset.subsets]
    changed += ["numbers of tags"] if any(0 < subset.token_warmup_step < 1 for subset in subsets) else []
    if changed:
        log.warning(
            "the state is of a run of %d steps, on which %s depend; a run of %d steps had others in the first %d, "
            "so the result will be between the two",
            before, " and ".join(changed), now, done,
        )  # fmt: skip


def _rates(config: TrainConfig, done: int, total_steps: int) -> list[float]:
    """The learning rates of the first steps, for a part that is trained."""
    trained = config.model.parts_named(config.trained_parts)
    lr = max(rate for part in trained for rate in config.optimizer.lrs_for(part))
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=lr)
    schedule = config.lr_scheduler.build(optimizer, total_steps)
    rates = []
    for _ in range(done):
        rates.append(optimizer.param_groups[0]["lr"])
        fast_forward(schedule, rates[-1:], 1)
    return rates


def _some(identities: Sequence[str]) -> str:
    """The first few file names."""
    return some([identity.split("/", 2)[-1] for identity in identities], NAMES_SHOWN, " and {} more")
