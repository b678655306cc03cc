"""The metadata of a trained file: sd-scripts' keys, values that its readers understand, and what the user says."""

from __future__ import annotations

import ast
import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors import safe_open

import lorakit
from lorakit.errors import ConfigError
from lorakit.training.output.metadata import MINIMAL_KEYS
from tests.training.conftest import MakeConfig

_KEYS = """
session_id training_started_at training_finished_at output_name training_comment sd_scripts_commit_hash seed
learning_rate text_encoder_lr unet_lr lr_scheduler lr_warmup_steps optimizer max_grad_norm
num_train_images num_validation_images num_reg_images num_batches_per_epoch num_epochs max_train_steps
gradient_checkpointing gradient_accumulation_steps steps epoch mixed_precision full_fp16 fp8_base fp8_base_unet lowram
cache_latents network_module network_dim network_alpha network_dropout network_args scale_weight_norms
v2 base_model_version sd_model_name sd_model_hash new_sd_model_hash vae_name vae_hash new_vae_hash clip_skip
max_token_length noise_offset noise_offset_random_strength adaptive_noise_scale multires_noise_iterations
multires_noise_discount ip_noise_gamma ip_noise_gamma_random_strength zero_terminal_snr min_snr_gamma
debiased_estimation loss_type huber_schedule huber_scale huber_c prior_loss_weight
caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate face_crop_aug_range resize_interpolation
validation_seed validation_split max_validation_steps validate_every_n_epochs validate_every_n_steps
datasets tag_frequency dataset_dirs batch_size_per_device total_batch_size resolution color_aug flip_aug random_crop
shuffle_caption enable_bucket bucket_no_upscale min_bucket_reso max_bucket_reso keep_tokens reg_dataset_dirs bucket_info
"""
KEYS = _KEYS.split()
"""All keys that train_network.py writes, without `ss_` in front."""

WITHOUT_MEANING = {
    "sd_scripts_commit_hash": "modelspec.implementation_version says which lorakit it was",
    "lowram": "there is one way of reading weights",
}
OF_OTHER_OPTIONS = {
    "num_validation_images", "validation_seed", "validation_split", "max_validation_steps", "validate_every_n_epochs",
    "validate_every_n_steps", "fp8_base", "fp8_base_unet", "scale_weight_norms", "color_aug", "random_crop",
    "face_crop_aug_range", "resize_interpolation",
}  # fmt: skip
"""Keys that say how an option was set which may not be there."""

TEXT = {
    "training_started_at", "training_finished_at", "session_id", "output_name", "training_comment", "lr_scheduler",
    "optimizer", "mixed_precision", "network_module", "base_model_version", "sd_model_name", "sd_model_hash",
    "new_sd_model_hash", "vae_name", "vae_hash", "new_vae_hash", "loss_type", "huber_schedule", "resize_interpolation",
}  # fmt: skip
JSON = {"network_args", "datasets", "tag_frequency", "dataset_dirs", "reg_dataset_dirs", "bucket_info"}


def metadata_of(path: Path) -> Mapping[str, str]:
    """The metadata in a file's header."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.fixture
def picture(photographs: Path) -> Path:
    """An image file."""
    return next(path for path in sorted(photographs.iterdir()) if path.suffix in (".png", ".jpg"))


def whole_run(make_config: MakeConfig, tiny_sd1_file: Path, **sections: object) -> Mapping[str, str]:
    """The metadata of a run in which every key has something to say."""
    merged = {
        "model": {"path": str(tiny_sd1_file), "vae": str(tiny_sd1_file), "clip_skip": 2},
        "network": {"name": "c3lier", "conv_rank": 2},
        "optimizer": {"weight_decay": 0.1},
        "data": {"batch_size": 2, "shuffle_caption": True},
        "training": {"max_epochs": 1, "gradient_accumulation_steps": 2},
        **sections,
    }
    return metadata_of(lorakit.train(make_config(**merged)))


def test_all_keys_of_sd_scripts(make_config: MakeConfig, tiny_sd1_file: Path) -> None:
    """Each key is there in its form: text, the text of a Python value, or JSON; and the numbers are the run's."""
    metadata = whole_run(make_config, tiny_sd1_file)
    missing = {key for key in KEYS if f"ss_{key}" not in metadata}
    assert WITHOUT_MEANING.keys() <= missing <= WITHOUT_MEANING.keys() | OF_OTHER_OPTIONS
    for key in set(KEYS) - missing:
        text = metadata[f"ss_{key}"]
        if key in JSON:
            assert isinstance(json.loads(text), dict | list), key
        elif key not in TEXT:
            assert str(ast.literal_eval(text)) == text, key
    for key in ("training_started_at", "training_finished_at", "session_id"):
        assert float(metadata[f"ss_{key}"]) > 0
    # Four photographs in two batches of two are one step of two batches, and one epoch.
    images, expected = int(metadata["ss_num_train_images"]), {"max_train_steps": 1, "num_epochs": 1, "steps": 1}
    assert images == 4
    expected |= {"epoch": 1, "num_batches_per_epoch": 2, "total_batch_size": 4, "batch_size_per_device": 2}
    assert {key: int(metadata[f"ss_{key}"]) for key in expected} == expected
    assert metadata["ss_resolution"] == "(64, 64)"
    assert metadata["ss_shuffle_caption"] == "True"
    assert re.fullmatch(r"torch\.optim\.adamw\.AdamW\(.*\bweight_decay=0\.1\b.*\)", metadata["ss_optimizer"])
    assert metadata["ss_new_vae_hash"] == metadata["ss_new_sd_model_hash"]
    assert not [key for key in metadata if not key.startswith(("ss_", "sshs_", "modelspec."))]


def test_the_optimizer_has_the_name_that_others_know(make_config: MakeConfig) -> None:
    """Of an optimizer that lorakit adapts to its needs, the class of its package is named."""
    path = lorakit.train(make_config(optimizer={"name": "dadaptadam", "lr": 1.0}, training={"max_steps": 1}))
    assert metadata_of(path)["ss_optimizer"].startswith("dadaptation.dadapt_adam.DAdaptAdam(")


def test_each_dataset_is_described(make_config: MakeConfig, tables: dict, photographs: Path) -> None:
    """`ss_datasets` has buckets, tags and subsets of each dataset; a key that datasets differ in stands only there."""
    folder = {"image_dir": str(photographs)}
    for key in ("image_dir", "resolution"):
        del tables["data"][key]
    datasets = [
        {"resolution": 64, "flip_aug": True, "subsets": [folder, {**folder, "num_repeats": 2}]},
        {"resolution": 64, "enable_bucket": True, "min_bucket_reso": 64, "batch_size": 2, "subsets": [folder]},
    ]
    metadata = metadata_of(lorakit.train(make_config(data={"datasets": datasets}, training={"max_steps": 1})))
    assert "ss_flip_aug" not in metadata
    assert "ss_enable_bucket" not in metadata
    assert metadata["ss_keep_tokens"] == "0"
    first, second = json.loads(metadata["ss_datasets"])
    assert (first["num_train_images"], second["num_train_images"]) == (12, 4)
    assert [subset["flip_aug"] for dataset in (first, second) for subset in dataset["subsets"]] == [True, True, False]
    assert first["bucket_info"]["buckets"] == {"0": {"resolution": [64, 64], "count": 12}}
    assert sum(bucket["count"] for bucket in second["bucket_info"]["buckets"].values()) == 4
    assert sum(first["tag_frequency"][photographs.name].values()) == 2 * sum(
        second["tag_frequency"][photographs.name].values()
    )
    names = [photographs.name, f"{photographs.name} (2)", f"{photographs.name} (3)"]
    folders = json.loads(metadata["ss_dataset_dirs"])
    assert list(folders) == names
    assert [found["n_repeats"] for found in folders.values()] == [1, 2, 1]
    assert {found["img_count"] for found in folders.values()} == {4}
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {}


def test_what_the_user_says(make_config: MakeConfig, picture: Path) -> None:
    """[metadata] becomes `modelspec.*`, the picture a data URL, and what follows from the run stands beside it."""
    said = {
        "title": "Cats", "author": "A", "description": "Cats, all of them.", "license": "CC0-1.0", "tags": "cat, pet",
        "usage_hint": "weight 0.8", "trigger_phrase": "sks cat", "merged_from": "a, b", "preprocessor": "none",
    }  # fmt: skip
    more = {"thumbnail": str(picture), "is_negative_embedding": True}
    path = lorakit.train(
        make_config(metadata={**said, **more}, loss={"min_timestep": 100}, training={"max_steps": 1})
    )  # fmt: skip
    metadata = metadata_of(path)
    assert {key: metadata[f"modelspec.{key}"] for key in said} == said
    assert metadata["modelspec.is_negative_embedding"] == "true"
    kind, _, content = metadata["modelspec.thumbnail"].partition(";base64,")
    assert kind == ("data:image/png" if picture.suffix == ".png" else "data:image/jpeg")
    assert base64.b64decode(content) == picture.read_bytes()
    assert metadata["modelspec.timestep_range"] == "100,1000"
    assert metadata["modelspec.resolution"] == "64x64"
    assert "modelspec.encoder_layer" not in metadata


def test_plain_run(make_config: MakeConfig) -> None:
    """Where the user says nothing, the title is the output's name and the other entries are not there."""
    metadata = metadata_of(lorakit.train(make_config(training={"max_steps": 1})))
    assert {key for key in metadata if key.startswith("modelspec.")} == {
        f"modelspec.{key}" for key in (
            "sai_model_spec", "architecture", "implementation", "title", "resolution", "date", "prediction_type",
            "implementation_version",
        )
    }  # fmt: skip
    assert metadata["modelspec.title"] == "test"


def test_minimal(make_config: MakeConfig, tiny_sd1_file: Path) -> None:
    """With `minimal`, of how it was trained nothing is left but what tools need to use the file."""
    metadata = whole_run(make_config, tiny_sd1_file, metadata={"minimal": True, "author": "A"})
    assert {key for key in metadata if key.startswith("ss_")} == set(MINIMAL_KEYS)
    assert metadata["modelspec.author"] == "A"
    assert len(metadata["sshs_model_hash"]) == 64
    assert not re.search(r"photograph|AdamW", "".join(metadata.values()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"thumb\.png cannot be read: No such file or directory"),
        (b"GIF89a" + bytes(1 << 20), r"thumb\.png is more than 1 MiB large, and would be stored in every file"),
        (b"RIFF1234WAVE", r"thumb\.png is not a PNG, JPEG, WebP or GIF image \(a JPEG of 256x256 pixels is enough"),
    ],
)
def test_thumbnails_that_cannot_be(
    content: bytes | None, message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    """A thumbnail that is not there, too large, or no image is told when the config is read."""
    if content:
        (tmp_path / "thumb.png").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"metadata\.thumbnail: .*{message}"):
        make_config(metadata={"thumbnail": "thumb.png"})
