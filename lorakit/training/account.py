"""What a run has done, for those who ask when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lorakit.api.observer import Observer, RunInfo
from lorakit.config.train_config import TrainConfig
from lorakit.networks.config import LoRAConfig
from lorakit.utils.wording import counted, duration, file_size, labelled, shown_path

_LABEL_WIDTH = 8


class RunAccount(Observer):
    """Remembers what a run has written and measured since this was made, and tells of it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds since any moment."""
        self._clock = clock
        self._started = clock()
        self._run: RunInfo | None = None
        self._step = 0
        self._saves: dict[Path, int] = {}
        self._losses: dict[int, float] = {}
        self._previews: Path | None = None

    def run_started(self, run: RunInfo) -> None:
        """Remember the run."""
        self._run = run
        self._step = run.first_step

    def step_finished(self, step: int) -> None:
        """Remember the step, to which the saves that follow belong."""
        self._step = step

    def adapter_saved(self, path: Path) -> None:
        """Remember the file."""
        self._saves.pop(path, None)
        self._saves[path] = self._step

    def validated(self, step: int, losses: Mapping[str, float]) -> None:
        """Remember the loss."""
        self._losses[step] = losses["average"]

    def previews_drawn(self, step: int, paths: Sequence[Path]) -> None:  # noqa: ARG002
        """Remember the folder."""
        if paths:
            self._previews = paths[0].parent

    def lines(self) -> list[str]:
        """What there is to say at the end of a run; nothing where none has been watched to its end."""
        saves = [path for path in self._saves if path.exists()]
        if self._run is None or not saves:
            return []
        *earlier, last = saves
        kept = f", and {counted(len(earlier), 'earlier save')}" if earlier else ""
        size = file_size(last.stat().st_size)
        first = f"Done in {duration(self._clock() - self._started)}: {shown_path(last)} ({size}){kept}"
        rows = labelled([*self._rows(self._run, last)], _LABEL_WIDTH)
        return [first, *([self._lowest(self._run)] if self._losses else []), *rows]

    def _rows(self, run: RunInfo, file: Path) -> Iterator[tuple[str, str]]:
        if self._previews is not None:
            sheet = self._previews / f"{run.config.output.name}_contact_sheet.png"
            has_sheet = any(getattr(own, "contact_sheet", False) for own in run.config.observers) and sheet.exists()
            yield "previews", shown_path(sheet if has_sheet else self._previews)
        if isinstance(run.config.network, LoRAConfig):
            yield "use", how_to_use(run.config, file)

    def _lowest(self, run: RunInfo) -> str:
        """When the validation loss was lowest, and the file of that moment."""
        step = min(self._losses, key=self._losses.__getitem__)
        files = [path for path, saved in self._saves.items() if saved == step and path.exists()]
        epoch, rest = divmod(step, run.steps_per_epoch)
        when = f"step {step}" if rest or not step else f"epoch {epoch}"
        return f"Lowest validation loss: {when}" + (f", {shown_path(files[-1])}" if files else "")


def how_to_use(config: TrainConfig, file: Path) -> str:
    """Where a LoRA file goes in the programs that draw with it, and what to write in prompts."""
    places = f"models/Lora: <lora:{file.stem}:1> in AUTOMATIC1111, Forge; models/loras in ComfyUI"
    words = [config.metadata.trigger_phrase]
    words += [own.class_tokens for dataset in config.data.datasets for own in dataset.subsets if not own.is_reg]
    known = list(dict.fromkeys(word for word in words if word))
    return f"{places}; words: {', '.join(known)}" if known else places
