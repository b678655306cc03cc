"""How long captions are for the text encoders of Z-Image and Anima, before any of them is loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from lorakit.api.model_family import ModelFamilyConfig
from lorakit.plugins.catalog import Catalog
from lorakit.testing.flow_models import make_tiny_anima, make_tiny_z_image

MAKERS: Mapping[str, Callable[[Path], Path]] = {"z_image": make_tiny_z_image, "anima": make_tiny_anima}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A tiny model of each family."""
    root = tmp_path_factory.mktemp("models")
    return {name: make(root / name) for name, make in MAKERS.items()}


def family(name: str, path: str | Path, **settings: str) -> ModelFamilyConfig:
    """The config of a model."""
    return Catalog.discover().find(ModelFamilyConfig, name)(path=str(path), **settings)


@pytest.mark.parametrize("name", MAKERS)
def test_lengths_are_those_of_the_tokenizers(name: str, folders: Mapping[str, Path]) -> None:
    """The tokens that encoding a caption takes, templates and ends included; of two tokenizers, the more."""
    config, captions = family(name, folders[name]), ["", "a cat", "a cat on a sofa, 猫", "x" * 600]
    lengths = config.caption_lengths(captions, weighted=False)
    assert lengths is not None
    tokens = config.build(torch.device("cpu"), torch.float32).text_encoder.tokenize(captions)
    taken = torch.stack([mask.sum(dim=1) for key, mask in tokens.items() if key.endswith("mask")]).amax(dim=0)
    assert [min(count, 512) for count in lengths.tokens] == taken.tolist()
    assert lengths.tokens[-1] > 600
    assert lengths.limit == 512


@pytest.mark.parametrize("name", MAKERS)
def test_long_captions_are_told(name: str, folders: Mapping[str, Path]) -> None:
    """What is cut off, and of which caption; nothing of those that fit."""
    config = family(name, folders[name])
    (warning,) = config.warnings_of_captions({"a.png": "x" * 600, "b.png": "a cat"}, weighted=False)
    longest = f"the longest, of a.png, has {config.caption_lengths(['x' * 600], weighted=False).tokens[0]} tokens"  # type: ignore[union-attr]
    message = "512 tokens are read, which cuts off the end of 1 of 2 captions"
    assert (warning.key, warning.message) == ("text_encoder", f"{message}; {longest}")
    assert not list(config.warnings_of_captions({"b.png": "a cat" * 90}, weighted=False))


@pytest.mark.parametrize("name", MAKERS)
def test_a_tokenizer_that_is_not_there(name: str, folders: Mapping[str, Path], tmp_path: Path) -> None:
    """Nothing is counted, downloaded or told where a tokenizer is missing, damaged or on the Hub."""
    (tmp_path / "tokenizer.json").write_text("{")
    gone = str(next((folders[name] / "transformer").glob("*.safetensors")))
    for path, settings in (
        (gone, {}),
        (tmp_path / "gone", {}),
        (folders[name], {"tokenizer": "Qwen/Qwen3-0.6B"}),
        (folders[name], {"tokenizer": str(tmp_path)}),
    ):
        config = family(name, path, **settings)
        assert config.caption_lengths(["a cat"], weighted=False) is None
        assert not list(config.warnings_of_captions({"a.png": "x" * 600}, weighted=False))


@pytest.mark.parametrize("name", MAKERS)
def test_counting_imports_no_torch(name: str, folders: Mapping[str, Path]) -> None:
    """Captions are counted before torch is there."""
    code = f"""
import sys
from lorakit.api.model_family import ModelFamilyConfig
from lorakit.plugins.catalog import Catalog
config = Catalog.discover().find(ModelFamilyConfig, {name!r})(path={str(folders[name])!r})
assert config.caption_lengths(["a cat"], weighted=False)
assert not {{"torch", "transformers"}} & sys.modules.keys(), "torch is there"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
