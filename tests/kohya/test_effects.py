"""What sd-scripts' options do to a run: every option that works is tested where its key acts, and some of them here."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import lorakit
from lorakit.config.load import config_from_tables
from lorakit.config.sd_scripts import OPTIONS
from lorakit.config.train_config import TrainConfig
from lorakit.data.images.buckets import assign_bucket
from lorakit.kohya.command_line import read_arguments
from lorakit.kohya.conversion import convert
from lorakit.kohya.draft import OptionStatus
from lorakit.models.vae import VaeEncoder
from lorakit.plugins.catalog import Catalog
from lorakit.testing.models import make_tiny_sd2
from tests.docs.pages import ROOT
from tests.kohya.conftest import LEAST
from tests.kohya.test_options import by_state

PICKING = {"name", "family"}
"""Keys that pick a component, which all tests of components name."""

ABOUT_TEXTS = {"kohya", "config", "docs"}
"""Folders of tests that read and write configs, and run nothing."""


@cache
def sources_of_runs() -> str:
    """The source of all tests but those that read and write configs."""
    files = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "plugins").rglob("test_*.py")]
    ran = (path for path in files if not ABOUT_TEXTS & set(path.relative_to(ROOT).parts))
    return "\n".join(path.read_text(encoding="utf-8") for path in ran)


@cache
def sources_of_conversions() -> str:
    """The source of the tests of conversions, but for those that go through the table."""
    files = [path for path in Path(__file__).parent.glob("test_*.py") if path.stem != "test_options"]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


@pytest.mark.parametrize("name", by_state(OptionStatus.WORKS))
def test_options_that_work_are_tested(name: str) -> None:
    """A test of what an option acts on names its key; one that picks a component is in a test of conversions."""
    key = OPTIONS[name].key.partition(" = ")[0].rpartition(".")[2]
    if key in PICKING:
        assert re.search(rf"--{name}\b", sources_of_conversions())
    else:
        here = Path(__file__).read_text(encoding="utf-8")
        assert re.search(rf"\b{key}\b", sources_of_runs()) or f"--{name}" in here


Configure = Callable[..., TrainConfig]


@pytest.fixture
def configured(tiny_sd1: Path, photographs: Path, tmp_path: Path, catalog: Catalog) -> Configure:
    """A function from words of a command line to the config of a short run with the tiny model."""
    (tmp_path / "dataset.toml").write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{photographs}'\ncaption_extension='.txt'\n"
    )
    common = [f"--pretrained_model_name_or_path={tiny_sd1}", *LEAST[1:], "--max_train_steps=1", "--seed=1"]

    def make(*words: str) -> TrainConfig:
        resolution = [] if any("--resolution" in word for word in words) else ["--resolution=64"]
        given = read_arguments([*common, *resolution, *words], tmp_path)
        tables: dict[str, Any] = convert(given, tmp_path, tmp_path, catalog).tables()
        tables["training"]["device"] = "cpu"
        tables["data"]["cache_dir"] = str(tmp_path / "cache")
        return config_from_tables(tables, tmp_path, catalog)

    return make


def length(file: Path) -> float:
    """Norm of all up factors in a file, which begin at zero."""
    factors: list[Tensor] = [tensor.flatten() for key, tensor in load_file(file).items() if "lora_up" in key]
    return float(torch.cat(factors).norm())


def test_gradients_are_clipped(configured: Configure) -> None:
    """The first step of gradient descent is as long as --max_grad_norm lets it be; 0 lets it be as long as it is."""
    descent = ("--optimizer_type=SGDNesterov", "--learning_rate=0.5", "--no_metadata")
    clipped = length(lorakit.train(configured(*descent, "--max_grad_norm=1e-4")))
    assert clipped == pytest.approx(0.5 * 1.9 * 1e-4, rel=1e-3)
    free = length(lorakit.train(configured(*descent, "--max_grad_norm=0")))
    assert free > 10 * clipped
    assert length(lorakit.train(configured(*descent, "--max_grad_norm=1e4"))) == pytest.approx(free, rel=1e-5)


@pytest.mark.parametrize(("words", "largest"), [((), 1), (("--vae_batch_size=3",), 3)])
def test_images_are_encoded_in_batches(
    words: tuple[str, ...], largest: int, configured: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VAE gets as many images at once as --vae_batch_size says."""
    sizes: list[int] = []
    encode = VaeEncoder.encode

    def counted(encoder: VaeEncoder, images: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(images))
        return encode(encoder, images)

    monkeypatch.setattr(VaeEncoder, "encode", counted)
    lorakit.train(configured(*words))
    assert max(sizes) == largest


@pytest.mark.parametrize(
    ("words", "size", "bucket"),
    [
        ("--min_bucket_reso=128 --max_bucket_reso=384", (900, 300), (384, 128)),
        ("--min_bucket_reso=128 --max_bucket_reso=320", (900, 300), (320, 128)),
        ("--min_bucket_reso=192 --max_bucket_reso=384", (900, 300), (320, 192)),
        ("--min_bucket_reso=128 --max_bucket_reso=384 --bucket_reso_steps=64", (500, 300), (320, 192)),
        ("--min_bucket_reso=128 --max_bucket_reso=384 --bucket_reso_steps=128", (500, 300), (256, 256)),
    ],
)
def test_buckets(words: str, size: tuple[int, int], bucket: tuple[int, int], configured: Configure) -> None:
    """Images go to the buckets that sd-scripts' arithmetic gives by hand for these limits, for 256×256 pixels."""
    (dataset,) = configured("--resolution=256", "--enable_bucket", *words.split()).data.datasets
    assert assign_bucket(size, dataset).bucket == bucket


def test_second_version(tmp_path: Path, configured: Configure) -> None:
    """--v2 trains a model of Stable Diffusion 2, and its file says so."""
    make_tiny_sd2(tmp_path / "model")
    file = lorakit.train(configured("--v2", f"--pretrained_model_name_or_path={tmp_path / 'model'}"))
    with safe_open(file, "pt") as stream:
        assert stream.metadata()["ss_base_model_version"] == "sd_v2"


@pytest.mark.parametrize("name", ["--xformers", "--mem_eff_attn", "--sdpa"])
def test_attention(name: str, configured: Configure) -> None:
    """All of sd-scripts' ways to compute attention are PyTorch's."""
    assert configured(name).attention.name == "sdpa"
