"""Drawing a grid: every prompt with every LoRA file at every strength, with the same seeds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from attrs import frozen

from lorakit.checkpoints.safetensors_header import read_safetensors_header
from lorakit.config.train_config import TrainConfig
from lorakit.errors import ModelError
from lorakit.grid.attached import adapts_text, attached, require_fit
from lorakit.models.interfaces import DiffusionModel
from lorakit.plugins.build import build_component
from lorakit.previews.previews import description, write_png
from lorakit.previews.prompts import PreviewJob
from lorakit.previews.sampling import Pixels, Texts, decode, encode_texts, sample_latents
from lorakit.training.runtime.device import find_device
from lorakit.training.setup import load_model

_SAVE = re.compile(r"(?:-\d{6}|-step\d{8}|-best)?")


@frozen
class Column:
    """The pictures of one LoRA file at one strength."""

    name: str
    """What the file is called among those of the grid."""
    strength: float
    pictures: tuple[Path, ...]
    """A PNG file for each prompt."""

    @property
    def title(self) -> str:
        """For the head of the column, in two lines."""
        return f"{self.name}\nstrength {self.strength:g}"


def distinct_names(files: Sequence[Path]) -> list[str]:
    """The stems of different files, with as many of the folders above them as it takes to tell them apart."""
    paths = [file.absolute() for file in files]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        for shown in ([path.with_suffix("") for path in paths], paths):
            names = ["/".join(path.parts[-depth:]) for path in shown]
            if len(set(names)) == len(names):
                return names
    return [str(path) for path in paths]


def saves_of(config: TrainConfig) -> list[Path]:
    """The LoRA files that a run has saved, in the order of their steps, the final one last."""
    name = config.output.name
    files = config.output.dir.glob("*.safetensors")  # the name may have characters that mean something in patterns
    found = [path for path in files if path.stem.startswith(name) and _SAVE.fullmatch(path.stem[len(name) :])]
    return sorted(found, key=lambda path: (path.stem == name, _steps(path), path.name))


def _steps(path: Path) -> int:
    """The training steps that a LoRA file was saved after; 0 if it does not say."""
    try:
        text = read_safetensors_header(path).metadata.get("ss_steps", "")
    except (ModelError, OSError):
        return 0
    return int(text) if text.isdecimal() else 0


@frozen
class GridPlan:
    """What to draw."""

    config: TrainConfig
    """Names the base model, and how to compute."""
    files: Sequence[Path]
    """The LoRA files, each once."""
    strengths: Sequence[float]
    jobs: Sequence[PreviewJob]
    """The prompts."""
    batch_size: int = 1
    """How many images are sampled at once."""

    @torch.no_grad()
    def draw(self, folder: Path, tell: Callable[[str], None]) -> Iterator[Column]:
        """Draw column by column into PNG files in a folder; `tell` hears what is being drawn.

        Raises AdapterError where a file is not for the model, and OutputError where one cannot be written.
        """
        for file in self.files:  # before minutes are spent on those in front
            require_fit(file, self.config)
        model = load_model(self.config, find_device(self.config.training.device))
        model.noise = model.noise.for_loss(self.config.loss)
        model.use_attention(build_component(self.config.attention))
        texts: Texts = {}
        for file, name in zip(self.files, distinct_names(self.files), strict=True):
            with attached(model, file, self.config) as network:
                changes_texts = adapts_text(network, self.config)
                for strength in self.strengths:
                    tell(f"{name}, strength {strength:g}")
                    network.multiplier = strength
                    if changes_texts or not texts:
                        texts = self._encoded(model)
                    start = folder / f"{name.replace('/', '_')}_{strength:g}"
                    words = f" <lora:{file.stem}:{strength:g}>"
                    written = self._written(start, words, _steps(file), self._pictures(model, texts))
                    yield Column(name, strength, tuple(written))
                if changes_texts:
                    texts = {}  # another file changes them in another way

    def _encoded(self, model: DiffusionModel) -> Texts:
        texts = [text for job in self.jobs for text in (job.prompt.prompt, job.prompt.negative_prompt)]
        return encode_texts(model, texts, self.config.data.weighted_captions)

    def _pictures(self, model: DiffusionModel, texts: Texts) -> Iterator[Pixels]:
        return decode(model, sample_latents(model, self.jobs, texts, self.batch_size))

    def _written(self, start: Path, words: str, steps: int, pictures: Iterator[Pixels]) -> Iterator[Path]:
        """Write the picture of each prompt to a path that begins so; `words` follow the prompt in its parameters."""
        for index, (job, pixels) in enumerate(zip(self.jobs, pictures, strict=True)):
            path = start.with_name(f"{start.name}_{index:02d}.png")
            write_png(path, pixels, description(job, steps, words))
            yield path
