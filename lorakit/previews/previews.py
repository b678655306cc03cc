"""Previews: images of the prompts in a file, sampled during training; their PNG files say how they were sampled."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen

from lorakit.api.model_family import ModelFamilyConfig
from lorakit.previews.prompt_files import read_prompts
from lorakit.previews.prompts import PreviewJob, Prompt, PromptSettings, preview_jobs
from lorakit.previews.sampling import Pixels, Texts, decode, encode_texts, preview_batches, sample_latents
from lorakit.utils.atomic_io import write_atomically

if TYPE_CHECKING:
    from lorakit.api.observer import RunInfo
    from lorakit.models.interfaces import Conditioning, DiffusionModel


@frozen(kw_only=True)
class Previewer:
    """Draws the prompts of a file, which is read again each time."""

    prompts: Path | Sequence[str]
    """The prompt file, or the lines of one."""
    settings: PromptSettings
    """Defaults of the prompts."""
    family: ModelFamilyConfig
    """The model's config, which says what prompts leave open."""
    seed: int
    """Seed of the run, for prompts without one."""
    batch_size: int
    """How many images are sampled at once."""
    texts_change: bool
    """Whether the text encoder is trained, so that texts are encoded again each time."""
    frees_text_encoder: bool
    """Whether nothing else needs the text encoder."""
    weighted: bool = False
    """Whether brackets in prompts say how much words count."""
    _texts: dict[str, Conditioning] = field(factory=dict, init=False)
    """The encoded texts, if they are encoded once."""

    def prepare(self, model: DiffusionModel, run: RunInfo) -> None:
        """Encode the prompts, if that is done once. Raises ConfigError if the file cannot be used."""
        if self.texts_change:
            return
        jobs = self.jobs(run)

        def encode() -> None:
            self._encoded(model, jobs)

        run.together(encode)

    def jobs(self, run: RunInfo) -> list[PreviewJob]:
        """The images to draw, as the main process reads them. Raises ConfigError there if the file cannot be used."""
        prompts = run.together(self._read if run.rank == 0 else list)[0]
        return preview_jobs(prompts, self.seed, self.family)

    def draw(self, model: DiffusionModel, jobs: Sequence[PreviewJob], run: RunInfo) -> list[Pixels]:
        """The pixels of all images, of which each process draws a share; all must call this.

        They are drawn in the same batches on any number of processes.
        """
        shares = preview_batches(jobs, self.batch_size)[run.rank :: run.world_size]
        own = [index for share in shares for index in share]

        def drawn() -> dict[int, Pixels]:
            mine = [jobs[index] for index in own]
            latents = sample_latents(model, mine, self._encoded(model, mine), self.batch_size)
            try:
                return dict(zip(own, decode(model, latents), strict=True))
            finally:
                model.free("vae_decoder")

        found = {index: pixels for part in run.together(drawn) for index, pixels in part.items()}
        return [found[index] for index in range(len(jobs))]

    def _read(self) -> list[Prompt]:
        return list(read_prompts(self.prompts, self.settings).prompts)

    def _encoded(self, model: DiffusionModel, jobs: Sequence[PreviewJob]) -> Texts:
        """The encoded texts of images; the text encoder is loaded only if one of them is new."""
        texts = [text for job in jobs for text in (job.prompt.prompt, job.prompt.negative_prompt)]
        if self.texts_change:
            return encode_texts(model, texts, self.weighted)
        new = [text for text in texts if text not in self._texts]
        if new:
            self._texts.update(encode_texts(model, new, self.weighted))
            if self.frees_text_encoder:
                model.free("text_encoder")
        return self._texts


def write_previews(
    jobs: Sequence[PreviewJob], pictures: Iterable[Pixels], folder: Path, stem: str, step: int
) -> list[Path]:
    """Write images that were drawn after training step `step`; returns the files, whose names start with `stem`.

    Raises OutputError if one cannot be written.
    """
    time = datetime.now().astimezone().strftime("%Y%m%d%H%M%S")
    paths = []
    for index, (job, pixels) in enumerate(zip(jobs, pictures, strict=True)):
        ending = "" if job.prompt.seed is None else f"_{job.prompt.seed}"
        path = folder / f"{stem}_{index:02d}_{time}{ending}.png"
        write_png(path, pixels, description(job, step))
        paths.append(path)
    return paths


def write_png(path: Path, pixels: Pixels, texts: dict[str, str]) -> None:
    """Write pixels [H, W, 3] and texts to a PNG file, atomically. Raises OutputError."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", pnginfo=info)
    write_atomically(path, content.getvalue())


def description(job: PreviewJob, step: int, lora: str = "") -> dict[str, str]:
    """How an image was sampled after training step `step`, by name.

    `parameters` has all of it in the format of AUTOMATIC1111's web UI; `lora` is appended to the prompt there.
    """
    prompt, sampler = job.prompt, job.sampler
    lines = [prompt.prompt + lora]
    guidance = "" if job.guidance is None else f"Distilled CFG Scale: {job.guidance:g}, "
    if prompt.negative_prompt:
        lines.append(f"Negative prompt: {prompt.negative_prompt}")
    lines.append(
        f"Steps: {job.steps}, Sampler: {sampler.title or sampler.name}, CFG scale: {job.scale:g}, "
        f"{guidance}Seed: {job.seed}, Size: {job.width}x{job.height}, Training step: {step}"
    )
    settings = {
        "prompt": prompt.prompt,
        "negative_prompt": prompt.negative_prompt,
        "width": job.width,
        "height": job.height,
        "steps": job.steps,
        "scale": job.scale,
        **({} if job.guidance is None else {"guidance": job.guidance}),
        "seed": job.seed,
        "sampler": prompt.sampler or sampler.name,
        "training_step": step,
    }
    return {"parameters": "\n".join(lines), **{name: str(value) for name, value in settings.items()}}
