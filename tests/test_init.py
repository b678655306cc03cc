"""The short config to start from: what is filled in, and that it can be trained with as it is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorakit.api.components import OptimizerConfig
from lorakit.api.model_family import ModelFamilyConfig
from lorakit.api.preset import Preset, PresetConfig
from lorakit.cli.init import (
    Start,
    full_config,
    look_at_images,
    look_at_model,
    plan_start,
    prompts_beside,
    short_config,
)
from lorakit.config.dump import starter
from lorakit.config.load import config_from_tables
from lorakit.config.train_config import TrainConfig
from lorakit.errors import ConfigError
from lorakit.models.families.z_image.checkpoint import transformer_shapes
from lorakit.plugins.catalog import Catalog
from lorakit.previews.prompts import Prompt, preview_jobs
from tests.config.conftest import SD1_SHAPES, SDXL_SHAPES, write_safetensors


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    """What is installed."""
    return Catalog.discover()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a model, and images without captions."""
    monkeypatch.chdir(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", SD1_SHAPES)
    add_images(tmp_path / "photos", 1)
    return tmp_path


def add_images(folder: Path, count: int) -> Path:
    """A folder with so many images."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (64, 64), "teal").save(folder / f"{number:03}.png")
    return folder


PRESETS: dict[str, Preset] = {
    name: found.component().build()  # type: ignore[attr-defined]
    for name, (found, *_) in Catalog.discover().of_kind(PresetConfig).items()
}


def start(catalog: Catalog, optimizer: str = "adamw", preset: str = "subject", **more: Any) -> Start:
    """What a config is written for."""
    return Start(preset=PRESETS[preset], optimizer=catalog.find(OptimizerConfig, optimizer), **more)


def read(begun: Start, folder: Path, catalog: Catalog) -> TrainConfig:
    """The config that is written, with its file of prompts beside it."""
    path = folder / "config.toml"
    prompts_beside(path).write_text(begun.prompts())
    return config_from_tables(tomllib.loads(short_config(begun, path)), folder, catalog)


OPTIMIZERS = [
    name
    for name, (found, *_) in Catalog.discover().of_kind(OptimizerConfig).items()
    if not found.component.takes_import_path
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_it_suits_every_optimizer(folder: Path, catalog: Catalog, optimizer: str, preset: str) -> None:
    """With each optimizer the config is good, has a learning rate that is usual for it, and nothing is warned of."""
    begun = start(catalog, optimizer, preset, model="model.safetensors", images=look_at_images(folder / "photos"))
    config = read(begun, folder, catalog)
    assert not list(config.warnings())
    own = config.optimizer
    assert own.lr == own.usual_lr
    assert {key: getattr(own, key) for key in own.usual_options} == own.usual_options
    assert own.lr_for(0) == own.lr if own.finds_learning_rate else own.lr_for(0) < own.lr


def test_it_is_short(catalog: Catalog) -> None:
    """It has about forty settings and comments, fits a screen, and says where the rest is."""
    text = short_config(start(catalog), Path("config.toml"))
    assert 30 <= len([line for line in text.splitlines() if line]) <= 42
    assert max(map(len, text.splitlines())) <= 110
    assert "lorakit check config.toml" in text
    assert "lorakit init --full" in text


def test_its_lines_read_well(folder: Path, catalog: Catalog) -> None:
    """Comments stand apart from long values, small rates are written alike, and the first line fits the purpose."""
    long = "name/" + "of-a-model-on-the-hub" * 3
    for preset, rate in (("subject", "1.5e-5"), ("style", "7.5e-6")):
        text = short_config(start(catalog, "lion", preset, model=long), folder / "config.toml")
        assert f'path = "{long}"  # or a Hub id' in text
        assert f"text_encoder_lr = {rate} " in text
        assert "lr = 3e-5 " in text
        assert f"about {PRESETS[preset].steps} are a good first try" in text.splitlines()[0]


@pytest.mark.parametrize(("count", "steps"), [(1, 2000), (7, 2000), (20, 2000), (150, 2000), (900, 2000)])
def test_repeats_and_epochs_follow_from_the_number_of_images(
    folder: Path, catalog: Catalog, count: int, steps: int
) -> None:
    """Few images are repeated, many get fewer epochs, so that the run is about as long as is usual."""
    begun = start(catalog, images=look_at_images(add_images(folder / "many", count)))
    repeats, epochs = begun.repeats_and_epochs
    assert 0.7 * steps <= count * repeats * epochs <= 1.5 * steps
    config = tomllib.loads(short_config(begun, folder / "config.toml"))
    assert (config["data"]["num_repeats"], config["training"]["max_epochs"]) == (repeats, epochs)


def test_paths_are_as_the_config_is_to_name_them(folder: Path, catalog: Catalog) -> None:
    """Images and model are found from the config's folder, whatever folder the command was typed in."""
    begun = start(catalog, images=look_at_images(Path("photos")), model="model.safetensors")
    (folder / "elsewhere").mkdir()
    for target in (folder / "config.toml", folder / "elsewhere" / "config.toml"):
        tables = tomllib.loads(short_config(begun, target))
        assert (target.parent / tables["data"]["image_dir"]).samefile(folder / "photos")
        assert (target.parent / tables["model"]["path"]).samefile(folder / "model.safetensors")
    assert tomllib.loads(short_config(begun, folder / "config.toml"))["data"]["image_dir"] == "photos"
    hub = start(catalog, model="stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert tomllib.loads(short_config(hub, folder / "config.toml"))["model"]["path"] == hub.model


def test_names_with_odd_characters(folder: Path, catalog: Catalog) -> None:
    """Quotation marks and backslashes in the name of a folder are written so that they read back."""
    odd = add_images(folder / 'the "cat\'s" \\ photos', 1)
    tables = tomllib.loads(short_config(start(catalog, images=look_at_images(odd)), folder / "config.toml"))
    assert (folder / tables["data"]["image_dir"]).samefile(odd)


def test_captions(folder: Path, catalog: Catalog) -> None:
    """Images without captions get one for all, from the name of the folder where sd-scripts has it there."""
    plain = short_config(start(catalog, images=look_at_images(folder / "photos")), folder / "config.toml")
    assert tomllib.loads(plain)["data"]["class_tokens"] == "photo of fluffy_cat"
    kohya = start(catalog, images=look_at_images(add_images(folder / "20_rex dog", 2)))
    tables = tomllib.loads(short_config(kohya, folder / "config.toml"))
    assert (tables["data"]["class_tokens"], tables["output"]["name"]) == ("rex dog", "rex_dog")
    assert "rex dog on a beach" in kohya.prompts()
    (folder / "photos" / "000.txt").write_text("a cat")
    captioned = short_config(start(catalog, images=look_at_images(folder / "photos")), folder / "config.toml")
    assert "class_tokens" not in tomllib.loads(captioned)["data"]


def test_the_resolution_is_the_models(folder: Path, catalog: Catalog) -> None:
    """A model of 1.x is for 512 pixels, one of 2.x mostly for 768, and so are the previews."""
    assert look_at_model("model.safetensors", catalog) is catalog.find(ModelFamilyConfig, "sd1")
    assert look_at_model("a-model/on-the-hub", catalog) is None
    for name, side, drawn in (("sd1", 512, None), ("sd2", 768, 768)):
        begun = start(catalog, family=catalog.find(ModelFamilyConfig, name))
        tables = tomllib.loads(short_config(begun, folder / "config.toml"))
        assert (tables["data"]["resolution"], tables["observers"][0].get("width")) == (side, drawn)


def test_it_suits_sdxl(folder: Path, catalog: Catalog) -> None:
    """For an SDXL the short config has its size, buckets, previews and memory, and nothing is warned of."""
    write_safetensors(folder / "xl.safetensors", SDXL_SHAPES)
    begun = plan_start(catalog, "subject", Path("photos"), "xl.safetensors", "adamw")
    config = read(begun, folder, catalog)
    assert not list(config.warnings())
    assert config.model.name == "sdxl"
    (dataset,) = config.data.datasets
    assert (dataset.resolution, dataset.enable_bucket, dataset.max_bucket_reso) == ((1024, 1024), True, 2048)
    assert config.training.gradient_checkpointing is True
    (drawn, *_) = preview_jobs([Prompt(prompt="a cat")], 1, config.model)
    assert (drawn.width, drawn.height, drawn.steps, drawn.scale, drawn.sampler.name) == (1024, 1024, 28, 7, "euler_a")
    text = short_config(begun, folder / "config.toml")
    assert "0 trains none, [1e-5, 0] the first alone" in text
    assert "clip_skip" not in text
    assert max(map(len, text.splitlines())) <= 110


def test_every_key_of_a_family(folder: Path, catalog: Catalog) -> None:
    """With a model, the config with every key has those of its family alone, and no problem; without, those of 1.x."""
    write_safetensors(folder / "xl.safetensors", SDXL_SHAPES)
    text = full_config(catalog, folder / "full.toml", Path("photos"), "xl.safetensors")
    config = config_from_tables(tomllib.loads(text), folder, catalog)
    assert (config.model.name, config.data.datasets[0].max_bucket_reso) == ("sdxl", 2048)
    assert "# prediction =" in text
    assert "clip_skip" not in text
    assert 'path = "a/b" ' in full_config(catalog, folder / "full.toml", None, "a/b")
    without = full_config(catalog, folder / "full.toml", None, None)
    assert without == starter(catalog)
    assert "# clip_skip = 1" in without


def test_what_cannot_be_started_with(folder: Path, catalog: Catalog) -> None:
    """A folder that is missing or has no images, and a model that is missing or of another kind, are told."""
    with pytest.raises(ConfigError, match="--images: nowhere is not a folder"):
        look_at_images(Path("nowhere"))
    (folder / "img").mkdir()
    with pytest.raises(ConfigError, match="put the images there first"):
        look_at_images(Path("img"))
    add_images(folder / "img" / "10_cat", 1)
    with pytest.raises(ConfigError, match=re.escape("img contains no images (they are in '10_cat')")):
        look_at_images(Path("img"))
    with pytest.raises(ConfigError, match=r"--model: .*missing.ckpt does not exist"):
        look_at_model("missing.ckpt", catalog)
    write_safetensors(folder / "other.safetensors", {"transformer.weight": (1,)})
    with pytest.raises(ConfigError, match="no installed plugin trains it"):
        look_at_model("other.safetensors", catalog)


def test_files_that_a_model_needs_beside_it(folder: Path, catalog: Catalog) -> None:
    """For a transformer alone there are keys for the other parts, with what to give; text encoders are not trained."""
    settings = {"dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 4, "cap_feat_dim": 32}
    write_safetensors(folder / "z.safetensors", dict(transformer_shapes(settings)))
    begun = plan_start(catalog, "subject", None, "z.safetensors", "adamw")
    text = short_config(begun, folder / "config.toml")
    config = tomllib.loads(text)
    assert config["model"].keys() == {"path", "text_encoder", "vae", "tokenizer"}
    assert config["model"]["text_encoder"] == "qwen_3_4b.safetensors"
    assert "c3lier" not in text
    assert "text_encoder_lr" not in config["optimizer"]
    assert config["data"]["resolution"] == 1024
