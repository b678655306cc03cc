"""Tiny models beside `tiny_sd1` and `tiny_sd1_file`, in every form, made once for all tests; read-only."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from lorakit.testing.flow_models import make_tiny_anima, make_tiny_z_image
from lorakit.testing.flux_models import make_tiny_chroma, make_tiny_flux
from lorakit.testing.models import make_tiny_sd2, make_tiny_sdxl, to_single_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")

FLOW_MAKERS: Mapping[str, Callable[[Path], Path]] = {
    "flux1": make_tiny_flux, "chroma": make_tiny_chroma, "z_image": make_tiny_z_image, "anima": make_tiny_anima,
}  # fmt: skip
"""What makes a tiny model of each flow-matching family."""


@pytest.fixture(scope="session")
def tiny_sd1_ckpt(tiny_sd1: Path) -> Path:
    """The model of `tiny_sd1` as a PyTorch checkpoint in the original layout."""
    return to_single_file(tiny_sd1, tiny_sd1.with_suffix(".ckpt"))


@pytest.fixture(scope="session")
def tiny_sd2(lorakit_offline: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a tiny Stable Diffusion 2.x that predicts velocity."""
    return make_tiny_sd2(tmp_path_factory.mktemp("models") / "tiny-sd2", prediction="v_prediction")


@pytest.fixture(scope="session")
def tiny_sd2_file(tiny_sd2: Path) -> Path:
    """The same model as one safetensors file in the original layout, which does not tell what it predicts."""
    return to_single_file(tiny_sd2, tiny_sd2.with_suffix(".safetensors"))


@pytest.fixture(scope="session")
def tiny_sd2_ckpt(tiny_sd2: Path) -> Path:
    """The same model as a PyTorch checkpoint in the original layout."""
    return to_single_file(tiny_sd2, tiny_sd2.with_suffix(".ckpt"))


@pytest.fixture(scope="session")
def tiny_sdxl(lorakit_offline: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a tiny Stable Diffusion XL."""
    return make_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl")


@pytest.fixture(scope="session")
def tiny_sdxl_file(tiny_sdxl: Path) -> Path:
    """The same model as one safetensors file in the original layout."""
    return to_single_file(tiny_sdxl, tiny_sdxl.with_suffix(".safetensors"))


@pytest.fixture(scope="session")
def tiny_flow(lorakit_offline: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from the name of a flow-matching family to a folder with a tiny model of it, which is made once."""
    root, made = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def of(name: str) -> Path:
        if name not in made:
            made[name] = FLOW_MAKERS[name](root / name)
        return made[name]

    return of
