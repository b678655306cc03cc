"""Tiny models in every form, made once for all tests of base models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorakit.testing.models import make_tiny_sd1, make_tiny_sd2, to_single_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a tiny Stable Diffusion 1.x."""
    return make_tiny_sd1(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_file(tiny_folder: Path) -> Path:
    """The same model as one safetensors file in the original layout."""
    return to_single_file(tiny_folder, tiny_folder.parent / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_ckpt(tiny_folder: Path) -> Path:
    """The same model as a PyTorch checkpoint in the original layout."""
    return to_single_file(tiny_folder, tiny_folder.parent / "tiny.ckpt")


@pytest.fixture(scope="session")
def tiny_sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a tiny Stable Diffusion 2.x."""
    return make_tiny_sd2(tmp_path_factory.mktemp("tiny-sd2") / "model", prediction="v_prediction")


@pytest.fixture(scope="session")
def tiny_sd2_file(tiny_sd2_folder: Path) -> Path:
    """The same model as one safetensors file in the original layout."""
    return to_single_file(tiny_sd2_folder, tiny_sd2_folder.parent / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_sd2_ckpt(tiny_sd2_folder: Path) -> Path:
    """The same model as a PyTorch checkpoint in the original layout."""
    return to_single_file(tiny_sd2_folder, tiny_sd2_folder.parent / "tiny.ckpt")
