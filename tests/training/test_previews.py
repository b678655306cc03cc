"""Previews in a run: what they show, when they come, and that training goes on as if they were not there."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lorakit
from lorakit.api.observer import Observer, StepMetrics
from lorakit.errors import ConfigError
from lorakit.plugins.catalog import Catalog
from lorakit.previews.prompts import Prompt, preview_jobs
from lorakit.previews.sampling import decode, encode_texts, sample_latents
from lorakit.training.loop import train
from lorakit.training.prepare import prepare
from lorakit.training.run import Run
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import add_observers, build_run
from lorakit.utils.wording import shown_path

SMALL = "--w 64 --h 64 --s 2"


class Watcher(Observer):
    """Remembers the losses and the previews, and does something before each step's previews."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.drawn: list[tuple[int, list[str]]] = []
        self.before: dict[int, Any] = {}

    def metrics_read(self, metrics: StepMetrics) -> None:
        """Remember the loss."""
        self.losses.append(metrics.loss)

    def previews_drawn(self, step: int, paths: list[Path]) -> None:
        """Remember the files."""
        self.drawn.append((step, [path.name for path in paths]))

    def step_finished(self, step: int) -> None:
        """Do what is to be done."""
        self.before.get(step, lambda: None)()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file with two prompts."""
    path = tmp_path / "prompts.txt"
    path.write_text(f"a cat {SMALL} --d 7\na dog {SMALL} --n blurry\n")
    return path


def observer(prompts: Path, **settings: Any) -> list[dict[str, Any]]:
    """The observers of a config that draws these prompts."""
    return [{"name": "samples", "prompts": str(prompts), **settings}]


def trained(config, catalog: Catalog, watcher: Watcher | None = None) -> tuple[Run, Watcher]:
    """A run after its last step, and what the watcher saw."""
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    watcher = watcher or Watcher()
    handle = RunHandle(run)
    add_observers(handle, catalog)
    handle.observers.add("watcher", watcher, essential=True, first=True)
    train(handle)
    return run, watcher


def perturbed(run: Run) -> Run:
    """The run, with adapters that change what the model does."""
    generator = torch.Generator().manual_seed(0)
    for part in run.network.parts:
        for parameter in run.network.parameters_of(part):
            nn.init.normal_(parameter, std=0.15, generator=generator)
    return run


def pipeline_of(folder: Path, scheduler: Any) -> Any:
    """The model in a pipeline of diffusers."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def published(cls: Any) -> Any:
    """A scheduler of diffusers with the settings of Stable Diffusion's own."""
    return cls(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def test_previews_compile_nothing(make_config, lorakit_one_thread: None) -> None:
    """In a run with torch.compile, previews and validation run eagerly: their shapes need no graphs of their own."""
    torch._dynamo.reset()
    counters.clear()
    training = {"compile": True, "compile_backend": "eager", "max_steps": 1}
    run = build_run(prepare(make_config(training=training)), Distributed(torch.device("cpu")))
    job = preview_jobs([Prompt(prompt="a cat", width=96, height=64, steps=1)], 0, run.config.model)
    with run.evaluating() as model:
        sample_latents(model, job, encode_texts(model, ["a cat", ""]), batch_size=1)
    assert not counters["stats"]["unique_graphs"]
    run.forward_backward(next(run.schedule.batches_from(0, run.loader)))
    assert counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_previews_are_those_of_diffusers(make_config, tiny_sd1: Path) -> None:
    """Latents and pixels are those of diffusers' own pipeline with the saved file loaded, for the same seeds."""
    from diffusers import DDIMScheduler

    run = perturbed(build_run(prepare(make_config(network={"dropout": 0.5})), Distributed(torch.device("cpu"))))
    shared = {"negative_prompt": "a blurry dog", "width": 96, "height": 64, "steps": 5, "scale": 6.0}
    prompts = [Prompt(prompt=text, seed=seed, **shared) for text, seed in (("a cat", 3), ("sand", 4))]
    pictures = preview_jobs(prompts, 0, run.config.model)
    with run.evaluating() as model:
        texts = encode_texts(model, ["a cat", "sand", "a blurry dog"])
        latents = sample_latents(model, pictures, texts, batch_size=2)
        pixels = list(decode(model, latents))
    path = RunHandle(run).save_adapter("lora")
    pipeline = pipeline_of(tiny_sd1, published(DDIMScheduler))
    without: list[Tensor] = []
    for loaded in (False, True):
        if loaded:
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
        for index, picture in enumerate(pictures):
            arguments = {
                "prompt": picture.prompt.prompt, "negative_prompt": "a blurry dog", "width": 96, "height": 64,
                "num_inference_steps": 5, "guidance_scale": 6.0,
            }  # fmt: skip
            theirs = pipeline(
                **arguments, output_type="latent", generator=torch.Generator().manual_seed(picture.seed)
            ).images
            if not loaded:
                without.append(theirs[0])
                continue
            change = (theirs[0] - without[index]).norm()
            assert change > 0.05 * without[index].norm()
            assert (latents[index] - theirs[0]).norm() < 2e-3 * change
            image = pipeline(**arguments, generator=torch.Generator().manual_seed(picture.seed)).images[0]
            assert pixels[index].shape == (64, 96, 3)
            assert np.abs(np.asarray(image).astype(int) - pixels[index]).max() <= 2


def test_pictures_of_a_batch_are_as_if_alone(make_config) -> None:
    """Pictures come in the order of their prompts, each the same whatever is drawn with it."""
    run = build_run(prepare(make_config()), Distributed(torch.device("cpu")))
    small = {"width": 64, "height": 64, "steps": 3, "sampler": "euler_a"}
    prompts = [
        Prompt(prompt="a cat", **small), Prompt(prompt="a dog", **{**small, "width": 72}),
        Prompt(prompt="a cow", negative_prompt="grass", **small), Prompt(prompt="a cat", **{**small, "scale": 1.0}),
        Prompt(prompt="a hen", **small),
    ]  # fmt: skip
    pictures = preview_jobs(prompts, 0, run.config.model)
    with run.evaluating() as model:
        texts = encode_texts(model, [*(prompt.prompt for prompt in prompts), "", "grass"])
        together = sample_latents(model, pictures, texts, batch_size=2)
        alone = [sample_latents(model, [picture], texts, 1)[0] for picture in pictures]
    assert [latents.shape[-1] for latents in together] == [8, 9, 8, 8, 8]
    for ours, own in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("parts", [["unet", "text_encoder"], ["unet"]])
def test_training_goes_on_as_if_there_were_none(parts: list[str], make_config, catalog: Catalog, prompts: Path) -> None:
    """Losses and weights are equal bit for bit with and without previews, with dropout and chance in the sampler."""
    captions = {"shuffle_caption": parts == ["unet"]}
    sections = {"network": {"parts": parts, "dropout": 0.3}, "data": captions, "training": {"max_steps": 4}}
    previews = observer(prompts, every_n_steps=1, at_first=True, sampler="euler_a", batch_size=2)
    plain, without = trained(make_config(**sections), catalog)
    drawing, watched = trained(make_config(**sections, observers=previews), catalog)
    assert [step for step, _ in watched.drawn] == [0, 1, 2, 3, 4]
    assert watched.losses == without.losses
    ours, theirs = drawing.network.adapter_state(), plain.network.adapter_state()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_files_and_what_they_say(make_config, catalog: Catalog, prompts: Path) -> None:
    """Names carry epoch or step, place, time and the prompt's own seed; the texts tell all that is needed to repeat."""
    sections = {"data": {"batch_size": 2}, "training": {"max_epochs": 2}}
    _, watcher = trained(
        make_config(**sections, observers=observer(prompts, every_n_epochs=1, every_n_steps=1)), catalog
    )
    run, _ = trained(make_config(**sections, observers=observer(prompts, every_n_steps=3, at_first=True)), catalog)
    folder = run.config.output.dir / "sample"
    assert [step for step, _ in watcher.drawn] == [run.schedule.steps_per_epoch, 2 * run.schedule.steps_per_epoch]
    names = sorted(re.sub(r"_\d{14}", "_TIME", path.name) for path in folder.glob("test_*_0?_*"))
    assert names == [
        f"test_{when}_{ending}"
        for when in ("000000", "000003", "000004", "e000001", "e000002")
        for ending in ("00_TIME_7.png", "01_TIME.png")
    ]
    cat, dog = (next(folder.glob(f"test_000003_0{index}_*")) for index in (0, 1))
    with Image.open(cat) as image:
        assert image.size == (64, 64)
        assert image.info["parameters"] == (
            "a cat\nSteps: 2, Sampler: DDIM, CFG scale: 7.5, Seed: 7, Size: 64x64, Training step: 3"
        )
        expected = {"prompt": "a cat", "seed": "7", "steps": "2", "sampler": "ddim", "scale": "7.5"}
        expected |= {"width": "64", "height": "64", "negative_prompt": "", "training_step": "3"}
        assert image.info.items() >= expected.items()
    with Image.open(dog) as image:
        assert image.info["parameters"].split("\n")[1] == "Negative prompt: blurry"
        seed = image.info["seed"]
    with Image.open(next(folder.glob("test_e000002_01_*"))) as image:
        assert image.info["seed"] == seed


def test_the_contact_sheet_shows_all_previews(make_config, prompts: Path) -> None:
    """It has a column for each time of drawing, those before a run was resumed too; it is left out on demand."""
    settings = {"every_n_steps": 2, "at_first": True}
    config = make_config(training={"max_steps": 4}, observers=observer(prompts, **settings))
    sheet = config.output.dir / "sample" / "test_contact_sheet.png"
    lorakit.train(config)
    whole = sheet.read_bytes()
    shutil.rmtree(config.output.dir)
    lorakit.train(
        make_config(
            training={"max_steps": 2}, output={"save_state_at_end": True}, observers=observer(prompts, **settings)
        )
    )
    sheet.unlink()
    lorakit.train(config, resume=config.output.dir / "test-state" / "step00000002")
    assert sheet.read_bytes() == whole
    with Image.open(sheet) as image:
        assert image.width > image.height
    sheet.unlink()
    lorakit.train(make_config(training={"max_steps": 2}, observers=observer(prompts, **settings, contact_sheet=False)))
    assert not sheet.exists()


def test_the_prompt_file_may_be_edited(
    make_config, catalog: Catalog, prompts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each preview reads the file anew; a mistake in it, or no file, is a warning, and the run goes on."""
    watcher = Watcher()
    watcher.before = {
        2: lambda: prompts.write_text("a hen --w wide"),
        3: prompts.unlink,
        4: lambda: prompts.write_text(f"a hen {SMALL} --d 9"),
    }
    config = make_config(network={"parts": ["unet"]}, observers=observer(prompts, every_n_steps=1))
    run, _ = trained(config, catalog, watcher)
    assert [step for step, _ in watcher.drawn] == [1, 4, 5, 6]
    assert [len(names) for _, names in watcher.drawn] == [2, 1, 1, 1]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "no previews at step 2: " in said[0]
    assert "line 1: --w: must be a whole number, not 'wide'" in said[0]
    assert "step 3" in said[1]
    assert "cannot be read" in said[1]
    assert len(said) == 2
    assert run.step == 6


def test_parts_are_freed(make_config, catalog: Catalog, prompts: Path) -> None:
    """After a preview the decoder is freed, and the text encoder unless captions need it."""
    for has_dynamic_captions in (False, True):
        config = make_config(
            network={"parts": ["unet"]}, data={"shuffle_caption": has_dynamic_captions}, training={"max_steps": 1},
            observers=observer(prompts, every_n_steps=1),
        )  # fmt: skip
        run, watcher = trained(config, catalog)
        assert watcher.drawn
        assert run.model._vae_decoder is None
        assert (run.model._text_encoder is not None) == has_dynamic_captions == run.encodes_captions


def test_brackets_mean_what_they_mean_in_captions(make_config, catalog: Catalog, prompts: Path) -> None:
    """With weighted captions a weight of 1 in a prompt changes nothing, and another does; else brackets are words."""
    prompts.write_text("".join(f"a {cat} {SMALL} --d 7\n" for cat in ("cat", "(cat:1.0)", "(cat:1.5)")))
    for weighted in (False, True):
        config = make_config(
            network={"parts": ["unet"]}, data={"weighted_captions": weighted}, training={"max_steps": 1},
            output={"name": f"weighted{weighted}"}, observers=observer(prompts, at_first=True),
        )  # fmt: skip
        run, _ = trained(config, catalog)
        paths = sorted((run.config.output.dir / "sample").glob(f"weighted{weighted}_000000_*"))
        plain, by_one, heavier = (np.asarray(Image.open(path)) for path in paths)
        assert np.array_equal(plain, by_one) is weighted
        assert not np.array_equal(plain, heavier)


def test_previews_follow_the_training(make_config, catalog: Catalog, prompts: Path) -> None:
    """Pictures of one prompt start from the same noise: equal where nothing was learned, else different."""
    pictures = {}
    for lr in (1e-30, 5e-2):
        config = make_config(
            optimizer={"lr": lr}, training={"max_steps": 2}, output={"name": f"lr{lr:g}"},
            observers=observer(prompts, every_n_steps=2, at_first=True),
        )  # fmt: skip
        run, _ = trained(config, catalog)
        paths = sorted((run.config.output.dir / "sample").glob(f"lr{lr:g}_*_01_*"))
        pictures[lr] = [np.asarray(Image.open(path)) for path in paths]
    assert np.array_equal(*pictures[1e-30])
    assert np.array_equal(pictures[1e-30][0], pictures[5e-2][0])
    assert not np.array_equal(*pictures[5e-2])


def test_changed_noise_process(make_config, catalog: Catalog, prompts: Path) -> None:
    """Previews of a model that is trained to end without signal are drawn with that schedule."""
    drawn = []
    for zero in (False, True):
        config = make_config(
            model={"prediction": "v_prediction"}, loss={"zero_terminal_snr": zero}, training={"max_steps": 1},
            optimizer={"lr": 1e-30}, output={"name": f"zero{zero}"},
            observers=observer(prompts, at_first=True, every_n_steps=9),
        )  # fmt: skip
        run, _ = trained(config, catalog)
        drawn.append(np.asarray(Image.open(next((run.config.output.dir / "sample").glob(f"zero{zero}_000000_00_*")))))
    assert not np.array_equal(*drawn)


def test_logs_show_previews(
    make_config, catalog: Catalog, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard gets each picture with its texts, under the same name each time; the terminal the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    observers = [*observer(prompts, every_n_steps=1), {"name": "tensorboard", "dir": str(tmp_path / "logs")}]
    config = make_config(training={"max_steps": 2}, observers=observers)
    trained(config, catalog)
    events = EventAccumulator(str(next((tmp_path / "logs").iterdir())))
    events.Reload()
    assert events.Tags()["images"] == ["previews/00", "previews/01"]
    metadata = events.SummaryMetadata("previews/01")
    assert metadata.display_name == "01 a dog"
    assert metadata.summary_description.startswith("a dog\nNegative prompt: blurry")
    shown = events.Images("previews/01")
    assert [(image.step, image.width, image.height) for image in shown] == [(1, 64, 64), (2, 64, 64)]
    (first, _) = events.Tensors("previews/01/text_summary")
    assert first.tensor_proto.string_val[0].decode().startswith("a dog\nNegative prompt: blurry\nSteps: 2")
    assert f"2 previews of step 2 in {shown_path(config.output.dir / 'sample')}" in capsys.readouterr().err


def test_problems_before_anything_is_read(make_config, prompts: Path) -> None:
    """What is wrong with prompts is said with the config's other problems, naming file and line."""
    prompts.write_text("a cat\na dog --s 0\n")
    with pytest.raises(ConfigError) as raised:
        make_config(observers=observer(prompts, every_n_steps=0), training={"max_steps": 0})
    said = str(raised.value).splitlines()
    assert "training.max_steps: must be at least 1, not 0" in said
    assert "observers[0].every_n_steps: must be at least 1, not 0" in said
    with pytest.raises(ConfigError) as raised:
        make_config(observers=observer(prompts, every_n_steps=1))
    assert str(raised.value) == f"observers[0].prompts: {prompts}, line 2: --s: must be at least 1, not 0"
    with pytest.raises(ConfigError, match=r"observers\[0\]\.sampler: no sampler is called 'dimm' \(.* 'ddim'"):
        make_config(observers=observer(prompts, every_n_steps=1, sampler="dimm"))


def test_warnings(make_config, prompts: Path) -> None:
    """What has no effect is told: steps beside epochs, and options of other models."""
    prompts.write_text("a cat --cn face.png\n")
    both = make_config(observers=observer(prompts, every_n_steps=1, every_n_epochs=1))
    at_the_end = make_config(observers=observer(prompts))
    foreign = f"observers[0].prompts: {prompts}, line 1: --cn: is for other models and has no effect"
    assert [str(warning) for warning in both.warnings()] == [
        "observers[0].every_n_steps: has no effect, because every_n_epochs is given", foreign
    ]  # fmt: skip
    assert [str(warning) for warning in at_the_end.warnings()] == [foreign]


def test_guidance_for_other_models(make_config, prompts: Path) -> None:
    """A guidance scale as an input has no effect in Stable Diffusion, and that is said at the key that has it."""
    prompts.write_text("a cat --g 3.5\n")
    said = "is for models that take a guidance scale as an input, and has no effect"
    in_file = make_config(observers=observer(prompts))
    assert [str(own) for own in in_file.warnings()] == [
        f"observers[0].prompts: --g {said} (leave it out; scale is that of classifier-free guidance)"
    ]
    in_config = make_config(observers=observer(prompts, guidance=2.0))
    assert [own.key for own in in_config.warnings()] == ["observers[0].guidance"]
