"""Samples: images sampled with the adapters while they are trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs import validators as v

from lorakit.api.components import ObserverConfig
from lorakit.api.hookspecs import hookimpl
from lorakit.api.observer import Every, Observer, RunInfo
from lorakit.errors import ConfigError, LorakitError, PluginError, Problem
from lorakit.plugins.catalog import Catalog
from lorakit.previews.contact_sheet import Preview, find_previews, write_contact_sheet
from lorakit.previews.prompts import PromptSettings, find_sampler
from lorakit.utils.wording import counted

if TYPE_CHECKING:
    from lorakit.config.train_config import TrainConfig
    from lorakit.previews.previews import Previewer
    from lorakit.previews.prompts import PreviewJob
    from lorakit.previews.sampling import Pixels

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class SamplesConfig(ObserverConfig, PromptSettings):
    """Preview images of the current LoRA, during training and at the end, in the folder `sample`."""

    name = "samples"
    everywhere = True

    prompts: Path | tuple[str, ...]
    """File with prompts: a `.txt` with one prompt per line, a `.toml` or a `.json`; it may be edited during the run. Or
    a list of prompts like the lines of a `.txt`: `["a cat --n blurry", "a dog"]`. The other keys here are the defaults
    for all prompts."""
    every_n_epochs: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Sample every N epochs; overrides `every_n_steps`."""
    every_n_steps: int | None = field(default=None, validator=v.optional(v.ge(1)))
    """Sample every N optimizer steps."""
    at_first: bool = False
    """Also sample before the first step."""
    batch_size: int = field(default=1, validator=v.ge(1))
    """Number of images of equal size, steps, sampler and scales to sample at once; more is faster but takes more
    memory."""
    contact_sheet: bool = True
    """Write a contact sheet with all previews, one row per prompt: `{name}_contact_sheet.png`."""

    def problems(self) -> Iterator[Problem]:
        """A sampler that there is not, and what is wrong with the prompt file."""
        from lorakit.previews.prompt_files import read_prompts

        try:
            if self.sampler is not None:
                find_sampler(self.sampler, Catalog.discover())
        except PluginError as error:
            yield Problem("sampler", str(error))
        try:
            read_prompts(self.prompts, self)
        except ConfigError as error:
            yield from (Problem("prompts", str(problem)) for problem in error.problems)

    def problems_with(self, config: TrainConfig) -> Iterator[Problem]:
        """Samplers that are for another noise process than the model's."""
        from lorakit.previews.prompt_files import read_prompts

        process, catalog = config.model.noise_process, Catalog.discover()
        names = (prompt.sampler for prompt in read_prompts(self.prompts, self).prompts)
        for name in dict.fromkeys(filter(None, names)):
            if not isinstance(process, find_sampler(name, catalog).process):
                message = f"{name!r} is not for {process.title}, which this model uses"
                yield Problem("sampler", message, f"leave it out, or set {process.sampler!r}")

    def warnings(self) -> Iterator[Problem]:
        """What has no effect here or in the prompt file."""
        from lorakit.previews.prompt_files import read_prompts

        if self.every_n_epochs and self.every_n_steps:
            yield Problem("every_n_steps", "has no effect, because every_n_epochs is given")
        for warning in read_prompts(self.prompts, self).warnings:
            yield Problem("prompts", str(warning))

    def warnings_with(self, config: TrainConfig) -> Iterator[Problem]:
        """A guidance scale for a model that takes none."""
        from lorakit.previews.prompt_files import read_prompts

        prompts = read_prompts(self.prompts, self).prompts
        if config.model.preview_guidance is None and any(own.guidance is not None for own in prompts):
            key, what = ("prompts", "--g ") if self.guidance is None else ("guidance", "")
            message = f"{what}is for models that take a guidance scale as an input, and has no effect"
            yield Problem(key, message, "leave it out; scale is that of classifier-free guidance")

    def build(self, run_info: RunInfo) -> Samples:
        """The previews of one run."""
        from lorakit.previews.previews import Previewer

        previewer = Previewer(
            prompts=self.prompts,
            settings=self,
            family=run_info.config.model,
            seed=run_info.config.training.seed,
            batch_size=self.batch_size,
            texts_change=run_info.config.trains_text_encoders,
            frees_text_encoder=not run_info.encodes_captions,
            weighted=run_info.config.data.weighted_captions,
        )
        return Samples(self, run_info, previewer)


class Samples(Observer):
    """Draws when it is time, and keeps the contact sheet.

    What is wrong with prompts or files by then is a warning, and the run continues.
    """

    def __init__(self, config: SamplesConfig, run: RunInfo, previewer: Previewer) -> None:
        """Encodes the prompts now where that is done once, so that the text encoder is free before the first step."""
        self._config = config
        self._run = run
        self._previewer = previewer
        self._step = run.first_step
        self._drawn_step = run.first_step or None
        self._every = Every(config.every_n_epochs, None if config.every_n_epochs else config.every_n_steps)
        self._folder = run.config.output.dir / "sample"
        self._drawn: list[Preview] = []
        if run.first_step and config.contact_sheet:  # what a run that is resumed has drawn already
            start = f"{run.config.output.name}_"
            earlier = (path for path in self._folder.glob("*.png") if path.name.startswith(start))
            self._drawn = find_previews(earlier, run.first_step)
        with self._warning(), run.evaluating() as model:
            previewer.prepare(model, run)

    def run_started(self, run: RunInfo) -> None:
        """Draw what the untrained adapters give, unless the run is resumed."""
        if self._config.at_first and run.first_step == 0:
            self._draw("e000000" if self._config.every_n_epochs else "000000")

    def step_finished(self, step: int) -> None:
        """Draw when the step is a multiple of `every_n_steps`."""
        self._step = step
        if self._every.is_due_after_step(step):
            self._draw(f"{step:06d}")

    def epoch_finished(self, epoch: int) -> None:
        """Draw when the epoch is a multiple of `every_n_epochs`."""
        if self._every.is_due_after_epoch(epoch):
            self._draw(f"e{epoch:06d}")

    def run_finished(self) -> None:
        """Draw what the run has come to, unless that was just done."""
        if self._drawn_step != self._step:
            epochs, rest = divmod(self._step, self._run.steps_per_epoch)
            by_epochs = self._config.every_n_epochs and not rest
            self._draw(f"e{epochs:06d}" if by_epochs else f"{self._step:06d}")

    def _draw(self, when: str) -> None:
        run, self._drawn_step = self._run, self._step
        with self._warning():
            jobs = self._previewer.jobs(run)
            run.tell("busy", f"drawing {counted(len(jobs), 'preview')} of step {self._step}")
            with run.evaluating() as model:
                pictures = self._previewer.draw(model, jobs, run)

            def write() -> None:
                if run.rank == 0:
                    self._write(jobs, pictures, when)

            run.together(write)

    def _write(self, jobs: Sequence[PreviewJob], pictures: Sequence[Pixels], when: str) -> None:
        from lorakit.previews.previews import write_previews

        name = self._run.config.output.name
        paths = write_previews(jobs, pictures, self._folder, f"{name}_{when}", self._step)
        self._run.tell("previews_drawn", self._step, paths)
        if self._config.contact_sheet:
            self._drawn += find_previews(paths, self._step)
            write_contact_sheet(self._folder / f"{name}_contact_sheet.png", self._drawn)

    @contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except LorakitError as error:
            if self._run.rank == 0:  # the others fail with it
                log.warning("there are no previews at step %d: %s", self._step, error)


@hookimpl
def register_observers() -> list[type[ObserverConfig]]:
    """Samples."""
    return [SamplesConfig]
