"""Previews: the pictures of a prompt file, drawn again and again with a model that is being trained."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen

from lorakit.api.components import ModelFamilyConfig
from lorakit.previews.png import PreviewJob, description, preview_jobs, write_png
from lorakit.previews.prompt_files import read_prompts
from lorakit.previews.prompts import PromptSettings
from lorakit.previews.sampling import Texts, decode, encode_texts, sample_latents

if TYPE_CHECKING:
    from lorakit.models.interfaces import Conditioning, DiffusionModel


@frozen(kw_only=True)
class Previewer:
    """Draws what a prompt file says, as it is at that time."""

    prompts: Path | Sequence[str]
    """The prompt file, or the lines of one."""
    settings: PromptSettings
    """What holds for prompts that say nothing else."""
    family: ModelFamilyConfig
    """The model's config, which says what prompts leave open."""
    seed: int
    """Seed of the run, for prompts without one."""
    batch_size: int
    """How many pictures are drawn at once."""
    texts_change: bool
    """Whether the text encoder is trained, so that texts have to be encoded anew each time."""
    frees_text_encoder: bool
    """Whether nothing else needs the text encoder."""
    weighted: bool = False
    """Whether brackets in prompts say how much words count."""
    _texts: dict[str, Conditioning] = field(factory=dict, init=False)
    """What was encoded, where that is done once."""

    def prepare(self, model: DiffusionModel) -> None:
        """Encode the prompts where that is done once. Raises ConfigError where the file cannot be used."""
        if not self.texts_change:
            self._encoded(model, self._pictures())

    def count(self) -> int:
        """How many images `draw` draws now. Raises ConfigError where the file cannot be used."""
        return len(read_prompts(self.prompts, self.settings).prompts)

    def draw(self, model: DiffusionModel, folder: Path, stem: str, step: int) -> list[Path]:
        """Draw all prompts after so many training steps; gives the files, whose names start with `stem`.

        Raises ConfigError where the prompt file cannot be used, and OutputError where a picture cannot be written.
        """
        pictures = self._pictures()
        latents = sample_latents(model, pictures, self._encoded(model, pictures), self.batch_size)
        time = datetime.now().astimezone().strftime("%Y%m%d%H%M%S")
        paths = []
        try:
            for index, pixels in enumerate(decode(model, latents)):
                own_seed = pictures[index].prompt.seed
                ending = "" if own_seed is None else f"_{own_seed}"
                path = folder / f"{stem}_{index:02d}_{time}{ending}.png"
                write_png(path, pixels, description(pictures[index], step))
                paths.append(path)
        finally:
            model.free("vae_decoder")
        return paths

    def _pictures(self) -> list[PreviewJob]:
        return preview_jobs(read_prompts(self.prompts, self.settings).prompts, self.seed, self.family)

    def _encoded(self, model: DiffusionModel, pictures: Sequence[PreviewJob]) -> Texts:
        """The pictures' texts, encoded; the text encoder is read only where one of them is new."""
        texts = [text for own in pictures for text in (own.prompt.prompt, own.prompt.negative_prompt)]
        if self.texts_change:
            return encode_texts(model, texts, self.weighted)
        new = [text for text in texts if text not in self._texts]
        if new:
            self._texts.update(encode_texts(model, new, self.weighted))
            if self.frees_text_encoder:
                model.free("text_encoder")
        return self._texts
