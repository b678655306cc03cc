"""Runs with masks and with images that change from epoch to epoch: they train, resume exactly and say so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import lorakit
from lorakit.config.train_config import TrainConfig
from lorakit.errors import DataError, Interrupted
from lorakit.plugins.catalog import Catalog
from lorakit.training.prepare import prepare
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run, fill_cache, run_training
from lorakit.training.step.loss import denoising_loss
from tests.training.test_runs import train_until

CPU = Distributed(torch.device("cpu"))
MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def masks(photographs: Path, tmp_path: Path) -> Path:
    """A mask for each photograph that leaves out its upper half."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for path in photographs.glob("*.png"):
        with Image.open(path) as image:
            width, height = image.size
        pixels = np.zeros((height, width), np.uint8)
        pixels[height // 2 :] = 255
        Image.fromarray(pixels).save(folder / path.name)
    return folder


@pytest.fixture
def faces(photographs: Path, tmp_path: Path) -> Path:
    """The photographs with faces in their names."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for path in photographs.glob("*.*"):
        shutil.copy(path, folder / (path.name if path.suffix == ".txt" else f"{path.stem}_40_32_20_24{path.suffix}"))
    return folder


def same(left: Path, right: Path) -> bool:
    """Whether two files hold the same tensors, bit for bit."""
    first, second = load_file(left), load_file(right)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


EVERYTHING = {"color_aug": True, "random_crop": True, "flip_aug": True, "resize_interpolation": "area", "batch_size": 2}


def test_augmented_run_is_repeatable(make_config: MakeConfig, catalog: Catalog, masks: Path) -> None:
    """With every augmentation and masks, the file is the same when resumed half-way and with other workers.

    It is not that of a run without them, and its metadata tells of all.
    """
    sections: dict[str, Any] = {"data": {**EVERYTHING, "conditioning_data_dir": str(masks)}}
    whole = lorakit.train(make_config(**sections, output={"name": "whole"}))
    workers = {"data": {**sections["data"], "workers": 3}}
    assert same(whole, lorakit.train(make_config(**workers, output={"name": "workers"})))
    stopped = make_config(**sections)
    with pytest.raises(Interrupted, match="step 3 of 6"):
        train_until(build_run(prepare(stopped), CPU), 3)
    assert same(whole, run_training(prepare(stopped), catalog, resume="latest"))
    assert not same(whole, lorakit.train(make_config(data={"batch_size": 2}, output={"name": "plain"})))
    with safe_open(whole, "pt") as file:
        metadata = file.metadata()
    for key in ("color_aug", "random_crop", "flip_aug"):
        assert metadata[f"ss_{key}"] == "True"
    assert metadata["ss_cache_latents"] == "False"
    assert metadata["ss_resize_interpolation"] == "area"
    assert metadata["ss_face_crop_aug_range"] == "None"
    ((described,),) = (own["subsets"] for own in json.loads(metadata["ss_datasets"]))
    assert (described["color_aug"], described["resize_interpolation"]) == (True, "area")


def test_faces_in_a_run(make_config: MakeConfig, faces: Path, catalog: Catalog) -> None:
    """Crops around faces train, with the captions of the names without faces, and can be resumed."""
    data = {"image_dir": str(faces), "face_crop_aug_range": [1.5, 2.5]}
    whole = lorakit.train(make_config(data=data, output={"name": "whole"}))
    config = make_config(data=data)
    assert prepare(config).datasets[0].examples[0].caption.startswith("a beach")
    with pytest.raises(Interrupted, match="step 3 of 6"):
        train_until(build_run(prepare(config), CPU), 3)
    assert same(whole, run_training(prepare(config), catalog, resume="latest"))
    with safe_open(whole, "pt") as file:
        assert file.metadata()["ss_face_crop_aug_range"] == "(1.5, 2.5)"


def test_cache_leaves_out_what_changes(make_config: MakeConfig, tables: dict[str, Any], tmp_path: Path) -> None:
    """Filling the cache encodes the images that stay as they are, and only a run with others keeps the encoder."""
    plain = build_run(prepare(make_config()), CPU)
    folder, resolution = tables["data"].pop("image_dir"), tables["data"].pop("resolution")
    subsets = [{"image_dir": folder, "color_aug": True}, {"image_dir": folder}]
    data = {"cache_dir": str(tmp_path / "cache"), "datasets": [{"resolution": resolution, "subsets": subsets}]}
    config = make_config(data=data, network={"parts": ["text_encoder"]})
    fill_cache(prepare(config))
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 4
    run = build_run(prepare(config), CPU)
    assert run.model._vae_encoder is run.loader.live.encoder is not None
    assert plain.model._vae_encoder is None
    assert plain.loader.live is None


def test_masked_loss_is_the_formula(make_config: MakeConfig, masks: Path) -> None:
    """The loss is mean(mask · d²), in float64, and not renormalised by the mask's area."""
    run = build_run(prepare(make_config(data={"conditioning_data_dir": str(masks), "batch_size": 2})), CPU)
    step = next(run.schedule.steps_from(0, run.schedule.batches_from(0, run.loader)))
    batch = next(step.batches)
    conditioning = run.encode(batch)
    assert batch.loss_mask.shape == (2, 1, 8, 8)
    assert 0.4 < float(batch.loss_mask.mean()) < 0.6
    with torch.no_grad():
        loss = denoising_loss(run.model, batch, conditioning, run.criterion)
        noisy = run.model.noise.add_noise(batch.latents, batch.noise, batch.timesteps)
        error = run.model.predict(noisy, batch.timesteps, conditioning).double() - batch.noise.double()
    expected = (batch.loss_mask.double() * error.square()).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_masked_places_are_not_learnt(make_config: MakeConfig, masks: Path, photographs: Path, tmp_path: Path) -> None:
    """With masks that are black all over there is no gradient; with white ones the file is that of no masks at all."""
    for value in (0, 255):
        for path in masks.glob("*.png"):
            with Image.open(path) as mask:
                Image.new("L", mask.size, value).save(path)
        path = lorakit.train(make_config(data={"conditioning_data_dir": str(masks)}, output={"name": f"mask{value}"}))
        ups = [tensor for key, tensor in load_file(path).items() if "lora_up" in key]
        assert all(not tensor.any() for tensor in ups) is (value == 0)
    assert same(path, lorakit.train(make_config(output={"name": "unmasked"})))


def test_transparency_in_a_run(make_config: MakeConfig, photographs: Path, tmp_path: Path) -> None:
    """Images that are opaque all over train as without alpha_mask; transparent ones teach nothing."""
    plain = lorakit.train(make_config(output={"name": "plain"}))
    for value in (255, 0):
        folder = tmp_path / str(value)
        shutil.copytree(photographs, folder)
        for path in folder.glob("*.png"):
            with Image.open(path) as image:
                picture = image.convert("RGB")
            picture.putalpha(value)
            picture.save(path)
        data = {"image_dir": str(folder), "alpha_mask": True}
        path = lorakit.train(make_config(data=data, output={"name": f"alpha{value}"}))
        ups = [tensor for key, tensor in load_file(path).items() if "lora_up" in key]
        assert same(path, plain) is (value == 255)
        assert all(not tensor.any() for tensor in ups) is (value == 0)


def test_missing_masks_stop_before_the_model_is_read(make_config: MakeConfig, masks: Path) -> None:
    """What is wrong with masks shows while files are looked at."""
    (masks / "beach.png").unlink()
    with pytest.raises(DataError, match=r"beach\.png: has no mask"):
        prepare(make_config(data={"conditioning_data_dir": str(masks)}))


def test_half_precision(make_config: MakeConfig) -> None:
    """The encoder's number format makes no difference to what a run with changing images can do."""
    path = lorakit.train(make_config(data=EVERYTHING, training={"mixed_precision": "bf16", "max_steps": 2}))
    assert all(tensor.isfinite().all() for tensor in load_file(path).values())
