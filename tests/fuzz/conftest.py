"""Sound files that the fuzzers damage."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomlkit
from PIL import Image

from tests.config.conftest import SD1_SHAPES, write_safetensors

CONFIG = {
    "model": {"path": "model.safetensors", "clip_skip": 2, "base_weights": [], "no_half_vae": False},
    "data": {
        "workers": 2,
        "datasets": [
            {
                "resolution": [64, 64], "enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 128,
                "subsets": [
                    {"image_dir": "photos", "num_repeats": 2, "shuffle_caption": True, "keep_tokens": 1},
                    {"image_dir": "photos", "metadata_file": "meta.json", "caption_prefix": "a"},
                ],
            }
        ],
    },
    "network": {"name": "lierla", "rank": 4, "alpha": 1.0, "parts": ["unet"]},
    "optimizer": {"name": "adamw", "lr": 1e-4, "betas": [0.9, 0.99]},
    "lr_scheduler": {"name": "cosine", "warmup_steps": 0.1},
    "training": {"max_epochs": 2, "seed": 7, "device": "cpu", "mixed_precision": "no"},
    "loss": {"min_snr_gamma": 5.0},
    "output": {"dir": "out", "name": "lora", "save_every_n_epochs": 1},
    "observers": [{"name": "samples", "prompts": "prompts.txt", "every_n_steps": 5}],
}  # fmt: skip
DATASET = {"general": {"batch_size": 1, "flip_aug": True}, "datasets": CONFIG["data"]["datasets"]}  # type: ignore[index]
META = {"image.png": {"caption": "a {red|blue} square", "tags": "red, square"}, "other": {"caption": "x"}}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that `CONFIG` names; its model has a header and no weights worth the name."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_safetensors(folder / "model.safetensors", SD1_SHAPES)
    (folder / "photos").mkdir()
    for name in ("image.png", "other.jpg"):
        Image.new("RGB", (64, 64), "teal").save(folder / "photos" / name)
    (folder / "photos" / "image.txt").write_text("teal, square")
    (folder / "prompts.txt").write_text("a photo --w 64 --h 64\n")
    (folder / "meta.json").write_text("{}")
    (folder / "sound.toml").write_text(tomlkit.dumps(CONFIG))
    return folder
